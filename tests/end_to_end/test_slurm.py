"""The sbatch script with stand-ins for slurm's commands: two nodes on one machine, a signal, a requeue."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from diptych.log import read_metrics
from diptych.testing import TINY_MODEL

ROOT = Path(__file__).parents[2]

# What slurm does: one task per node, each with its number; signals reach every process of the tasks.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do [[ "$1" == --output=* ]] && log="${1#--output=}"; shift; done
trap '' USR1
pids=()
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
  SLURM_NODEID=$node setsid "$@" >> "${log/\\%n/$node}" 2>&1 &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then echo 127.0.0.1; else echo "$@" >> "$STAND_IN/requeued"; fi
"""
SCANCEL = """#!/usr/bin/env bash
for process in /proc/[0-9]*; do
  if tr '\\0' '\\n' < "$process/environ" 2>/dev/null | grep -qx "STAND_IN=$STAND_IN" \\
    && tr '\\0' '\\n' < "$process/environ" 2>/dev/null | grep -q "^SLURM_NODEID="; then
    kill -USR1 "${process#/proc/}" 2>/dev/null
  fi
done
true
"""


@pytest.fixture
def job(shards: Path, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a job of two nodes."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    tree = {
        "run": str(tmp_path / "run"),
        "total_samples": 4_000,
        "global_batch": 8,
        "precision": "fp32",
        "model": TINY_MODEL,
        "data": {"shards": str(shards), "lanes": 2, "workers": 1, "captions": {"views": [{"columns": ["name"]}]}},
        "log": {"every_steps": 5, "tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    environment = os.environ | {
        "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STAND_IN": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "here[0-1]",
        "RANKS_PER_NODE": "1",
        "ACCELERATE_CONFIG": str(ROOT / "configs" / "accelerate" / "cpu.yaml"),
        "OMP_NUM_THREADS": "1",
    }
    return ["bash", str(ROOT / "slurm" / "pretrain.sbatch"), str(tmp_path / "run.yaml")], environment


@pytest.mark.distributed
def test_a_job_of_two_nodes_is_queued_again_and_goes_on(job: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    command, environment = job
    batch = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        while not metrics.exists() or not metrics.read_text():
            time.sleep(0.05)
            assert batch.poll() is None, (tmp_path / f"slurm-{os.getpid()}-node0.log").read_text()
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(timeout=90) == 0
    finally:
        batch.kill()
        batch.wait()
    log = (tmp_path / f"slurm-{os.getpid()}-node0.log").read_text()
    assert "ranks=2 way=ddp" in log
    assert "SIGUSR1 after step" in log
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    stopped_at = read_metrics(metrics)[-1]["step"]
    again = [*command, "total_samples=4000"]
    (tmp_path / "requeued").unlink()
    done = subprocess.run(again, cwd=tmp_path, env=environment, timeout=250, check=False)
    assert done.returncode == 0
    assert not (tmp_path / "requeued").exists()
    log = (tmp_path / f"slurm-{os.getpid()}-node0.log").read_text()
    assert f"resumed step={int(stopped_at)}" in log
    assert [row["step"] for row in read_metrics(metrics)] == list(range(5, 501, 5))


def test_without_a_configuration_it_says_how(job: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    command, environment = job
    done = subprocess.run(command[:2], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
