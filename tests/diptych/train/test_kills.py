"""A run that is really killed, anywhere, and started again ends with the numbers of a run that never stopped."""

import multiprocessing as mp
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import yaml

import diptych.testing as make
from diptych.cli import main
from diptych.log import read_metrics
from diptych.train import checkpoint


def write_config(root: Path, *, total_samples: int) -> Path:
    tree = {
        "total_samples": total_samples,
        "global_batch": 8,
        "precision": "fp32",
        "ema_decay": 0.9,
        "model": make.TINY_MODEL,
        "data": {"shards": str(root / "shards"), "lanes": 2, "workers": 1, "shuffle_window": 5},
        "optim": {"peak_lr": 1e-2},
        "checkpoint": {"every_samples": 16, "keep_last": 2},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(config: Path, run: Path) -> BaseProcess:
    """The command in a process of its own (forked, because the imports alone take seconds)."""
    process = mp.get_context("fork").Process(target=_command, args=(["train", str(config), f"run={run}", "--quiet"],))
    process.start()
    return process


def _command(arguments: list[str]) -> None:
    sys.exit(main(arguments))


def finish(config: Path, run: Path) -> None:
    process = start(config, run)
    process.join()
    assert process.exitcode == 0


def kill_during(config: Path, run: Path, steps: int, rng: np.random.Generator) -> bool:
    """Kills the run some steps after its start, at no particular point of a step; False when it had ended."""
    process = start(config, run)
    first = newest_step(run)
    while process.is_alive() and newest_step(run) < first + steps:
        time.sleep(0.002)
    time.sleep(float(rng.uniform(0, 0.05)))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_again_and_again(kills: int, tmp_path: Path) -> None:
    make.write_shards(tmp_path / "shards", [10, 7, 0, 13, 4, 6])
    config = write_config(tmp_path, total_samples=8 * 20 * (kills + 1))
    finish(config, tmp_path / "whole")
    rng = np.random.default_rng(0)
    killed = sum(kill_during(config, tmp_path / "parts", 6, rng) for _ in range(kills))
    assert killed == kills
    finish(config, tmp_path / "parts")
    whole, parts = (checkpoint.newest(tmp_path / name / "checkpoints") for name in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    assert whole.name == parts.name
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    steps, losses = ([[row[key] for row in run] for run in rows] for key in ("step", "train/loss/total"))
    assert steps[0] == steps[1]
    assert losses[0] == losses[1]
