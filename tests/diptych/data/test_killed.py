"""Readers killed without warning, at any moment, and started again, perhaps as other ranks and workers: no sample is
lost, repeated or moved."""

import json
import multiprocessing
import os
import random
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import diptych.testing as make
from diptych.config import from_tree
from diptych.data.batch import Cursors
from diptych.data.loader import build_loader
from diptych.data.reader import Feed
from diptych.data.sources import DataConfig

BATCH = 16
LAYOUTS = [(1, 0), (1, 2), (2, 0), (2, 1), (4, 0), (2, 2), (1, 1), (4, 1)]


class Tokenizer:
    context_length = 4

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text), 9, 0, 0] for text in texts])


def config(folder: Path, workers: int) -> DataConfig:
    sources = [
        {"name": "one", "shards": str(folder / "one"), "weight": 2},
        {"name": "two", "shards": str(folder / "two"), "weight": 1},
    ]
    tree = {
        "sources": sources,
        "weight_changes": [{"at_samples": 700, "weights": {"two": 3}}],
        "lanes": 4,
        "shuffle_window": 11,
        "workers": workers,
        "max_bad_fraction": 1.0,
    }
    return from_tree(DataConfig, tree)


def shards(folder: Path) -> None:
    """Sizes from none to several windows, one shard without index, one cut off."""
    make.write_shards(folder / "one", [13, 0, 40, 1, 25, 30])
    make.write_shards(folder / "two", [7, 9, 0, 17], indexed=False)
    broken = folder / "two" / "000003.tar"
    broken.write_bytes(broken.read_bytes()[:12000])


def read(folder: Path, log: Path, rank: int, layout: tuple[int, int], start: dict[str, Any] | None) -> None:
    """One rank: writes the keys of each batch and the cursors after it, as a checkpoint at every step would."""
    os.setsid()
    world, workers = layout
    feed = Feed(BATCH, rank, world, seed=3, image_size=16, tokenizer=Tokenizer())
    cursors = Cursors.from_json(start) if start is not None else None
    with build_loader(config(folder, workers), feed).batches(cursors) as batches, log.open("w") as file:
        for batch in batches:
            file.write(json.dumps([list(batch.keys), batch.cursors.to_json()]) + "\n")
            file.flush()


def whole_lines(log: Path) -> list[Any]:
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def run_until_killed(
    folder: Path, layout: tuple[int, int], start: dict[str, Any] | None, rng: random.Random
) -> tuple[list[list[str]], dict[str, Any] | None]:
    """Sorted keys of the global batches that all ranks have read, and the cursors after the last of them."""
    world = layout[0]
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    for log in logs:
        log.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=read, args=(folder, log, r, layout, start)) for r, log in enumerate(logs)]
    for process in ranks:
        process.start()
    wanted = rng.randrange(1, 9)
    deadline = time.monotonic() + 60
    while min(len(whole_lines(log)) for log in logs) < wanted and time.monotonic() < deadline:
        time.sleep(rng.random() * 0.01)
    for process in ranks:
        os.killpg(process.pid, signal.SIGKILL)
    for process in ranks:
        process.join()
    steps = list(zip(*(whole_lines(log) for log in logs), strict=False))
    keys = [sorted(key for part in step for key in part[0]) for step in steps]
    cursors = Cursors.merge([Cursors.from_json(part[1]) for part in steps[-1]]).to_json() if steps else start
    return keys, cursors


def check_kills(folder: Path, kills: int, seed: int) -> None:
    shards(folder)
    rng = random.Random(seed)
    seen: list[list[str]] = []
    cursors = None
    for number in range(kills):
        keys, cursors = run_until_killed(folder, LAYOUTS[number % len(LAYOUTS)], cursors, rng)
        assert keys
        seen += keys
    feed = Feed(BATCH, 0, 1, seed=3, image_size=16, tokenizer=Tokenizer())
    with build_loader(config(folder, 0), feed).batches() as batches:
        unbroken = [sorted(batch.keys) for batch in islice(batches, len(seen))]
    assert seen == unbroken


@pytest.mark.distributed
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    check_kills(tmp_path, 20, seed=0)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_hundred_kills_change_nothing(tmp_path: Path, seed: int) -> None:
    check_kills(tmp_path, 20, seed)
