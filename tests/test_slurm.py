"""The batch script starts what it says, once per node; slurm's own commands are stood in for."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "slurm" / "pretrain.sbatch"
COMMANDS = {
    "scontrol": "printf 'node7\\nnode8\\n'",
    "accelerate": 'echo "$@"',
    "srun": 'while [[ $1 == --* ]]; do shift; done\nfor n in 0 1; do SLURM_NODEID=$n "$@"; done',
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "123",
        "SLURM_GPUS_ON_NODE": "4",
    }
    return os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_one_launcher_per_node(environment: dict[str, str]) -> None:
    command = ["bash", str(SCRIPT), "mine.yaml", "run=runs/with space"]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f"--num_machines 2 --machine_rank {rank} --num_processes 8" in line
        assert "--main_process_ip node7 --main_process_port 20123" in line
        assert line.endswith("-m diptych.train mine.yaml run=runs/with space")


def test_a_job_of_an_array_puts_its_number_into_the_settings(environment: dict[str, str]) -> None:
    command = ["bash", str(SCRIPT), "mine.yaml", "run=runs/seed%a", "seed=%a"]
    array = environment | {"SLURM_ARRAY_TASK_ID": "3"}
    line = subprocess.run(command, env=array, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    assert line.endswith("mine.yaml run=runs/seed3 seed=3")


def test_without_a_configuration_it_says_how(environment: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_it_stays_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 60
