"""`accelerate launch -m diptych eval`: the numbers of one process, to the last bit; evaluation while ranks train."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.diptych_eval.fakes import benchmark

import diptych.testing as make
from diptych.cli import main
from diptych.log import read_metrics

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


def files(root: Path) -> tuple[Path, Path]:
    """A recipe and a list of tasks."""
    data = benchmark(root / "data", count=24)
    make.write_shards(root / "shards", [10, 7, 0, 13, 4, 6])
    tasks = [
        {"type": "zeroshot", "dataset": "colours", "root": str(data)},
        {"type": "retrieval", "dataset": "colours", "path": str(data / "test"), "forms": [["name"]]},
    ]
    (root / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks, "embed": {"batch_size": 5}}))
    tree = {
        "run": str(root / "run"),
        "total_samples": 32,
        "global_batch": 8,
        "precision": "fp32",
        "model": make.TINY_MODEL,
        "data": {"shards": str(root / "shards"), "lanes": 4, "workers": 0},
        "log": {"every_steps": 1, "tensorboard": False},
        "evaluate": {"config": str(root / "tasks.yaml"), "every_samples": 16},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    return root / "run.yaml", root / "tasks.yaml"


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_two_ranks_measure_what_one_does(tmp_path: Path, launch: Callable[..., None]) -> None:
    recipe, tasks = files(tmp_path)
    launch(recipe)
    run = tmp_path / "run"
    rows = [row for row in read_metrics(run / "metrics.jsonl") if any(name.startswith("eval/") for name in row)]
    assert [row["step"] for row in rows] == [2, 4]
    assert main(["eval", str(run), "--config", str(tasks), "--out", str(tmp_path / "one"), "--quiet"]) == 0
    configuration = ROOT / "configs" / "accelerate" / "cpu.yaml"
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(configuration)]
    command += ["-m", "diptych", "eval", str(run), "--config", str(tasks), "--out", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert "retrieval colours" in done.stdout
    found = {
        f"eval/{one['task']}/{one['dataset']}/{name}": v
        for one in results(tmp_path / "one")["results"]
        for name, v in one["metrics"].items()
    }
    assert {name: value for name, value in rows[-1].items() if name in found} == found
