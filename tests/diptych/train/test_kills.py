"""A run of which a process is really killed, anywhere, and that is started again, ends with the numbers of a run that
never stopped."""

import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.state import PartialState

import diptych.testing as make
from diptych import checkpoint
from diptych.cli import main
from diptych.log import read_metrics


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


@dataclass(frozen=True)
class Run:
    """The command in processes of its own (forked, because the imports alone take seconds), as a launcher starts it."""

    ranks: tuple[BaseProcess, ...]
    folder: Path

    def wait(self) -> list[int | None]:
        """Until all have ended; their exit codes."""
        for process in self.ranks:
            process.join(60)
        return [process.exitcode for process in self.ranks]

    def said(self, rank: int) -> str:
        """What a rank wrote to stderr."""
        return (self.folder / f"rank{rank}.log").read_text()


def start(config: Path, run: Path, world_size: int) -> Run:
    context = mp.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    for one in launched:
        one |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        one |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    logs = run.with_name(f"{run.name}-logs")
    logs.mkdir(exist_ok=True)
    ranks = [context.Process(target=_command, args=(config, run, logs, one)) for one in launched]
    for process in ranks:
        process.start()
    return Run(tuple(ranks), logs)


def _command(config: Path, run: Path, logs: Path, launched: dict[str, str]) -> None:
    os.environ |= launched
    PartialState._reset_state()  # what the parent process has been
    with (logs / f"rank{launched['RANK']}.log").open("w") as sys.stderr:
        code = main(["train", str(config), f"run={run}", "--quiet"])
    os._exit(code)


def finish(config: Path, run: Path, world_size: int) -> None:
    started = start(config, run, world_size)
    assert started.wait() == [0] * world_size, started.said(0)


def kill_during(config: Path, run: Path, world_size: int, steps: int, rng: np.random.Generator) -> None:
    """Kills a rank some steps after the start, at no particular point of a step; the others end by themselves, and
    tell which rank it was."""
    started = start(config, run, world_size)
    victim = int(rng.integers(world_size))
    first = newest_step(run)
    while newest_step(run) < first + steps:
        assert all(process.is_alive() for process in started.ranks), started.said(0)
        time.sleep(0.002)
    time.sleep(float(rng.uniform(0, 0.05)))
    started.ranks[victim].kill()
    codes = started.wait()
    assert codes[victim] == -signal.SIGKILL
    for rank in set(range(world_size)) - {victim}:
        assert codes[rank] == 2
        assert f"diptych: error: rank {victim} of {world_size} " in started.said(rank)


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_again_and_again(kills: int, world_size: int, tmp_path: Path) -> None:
    make.write_shards(tmp_path / "shards", [10, 7, 0, 13, 4, 6])
    config = write_config(tmp_path, total_samples=8 * 20 * (kills + 1))
    finish(config, tmp_path / "whole", world_size)
    rng = np.random.default_rng(0)
    for _ in range(kills):
        kill_during(config, tmp_path / "parts", world_size, 6, rng)
    finish(config, tmp_path / "parts", world_size)
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
