"""Unusable samples in a run: counted over all ranks and across restarts, and too many of them end it everywhere."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import PartialState

import diptych.testing as make
from diptych.config import dump, from_tree
from diptych.data.faults import Fault, FaultLog
from diptych.data.loader import Loader
from diptych.data.reader import Feed
from diptych.data.sources import DataConfig, resolve
from diptych.errors import ConfigError, DataError
from diptych.log import read_metrics
from diptych.testing import TINY_MODEL, TinySample, run_ranks, tiny_sample
from diptych.train import loop
from diptych.train.loop import train
from diptych.train.recipe import Recipe


@pytest.fixture
def bad_shards(tmp_path: Path) -> Path:
    """Four shards of twenty samples; the last has five without a picture."""
    for number in range(4):
        samples = [tiny_sample(f"s{number}{i:02d}") for i in range(20)]
        if number == 3:
            samples[3:8] = [TinySample(f"blind{i}", {"txt": b"no picture"}) for i in range(5)]
        make.write_shard(tmp_path / "shards" / f"{number:06d}.tar", samples)
    return tmp_path / "shards"


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "run": str(run),
        "total_samples": 1600,
        "global_batch": 40,
        "precision": "fp32",
        "model": TINY_MODEL,
        "data": {"shards": str(shards), "lanes": 4, "workers": 0, "max_bad_fraction": 1.0},
        "log": {"every_steps": 5, "tensorboard": False},
        "checkpoint": {"every_samples": 400},
    }
    tree["data"] |= changes.pop("data", {})
    return from_tree(Recipe, tree | changes)


def _train(rank: int, settings: Recipe) -> str:
    """As a launcher would start it."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1"}
    PartialState._reset_state()  # what the parent process has been
    try:
        train(settings)
    except DataError as error:
        return str(error)
    return "finished"


@pytest.mark.distributed
def test_all_ranks_stop_with_the_worst_shards(bad_shards: Path, tmp_path: Path) -> None:
    settings = recipe(bad_shards, tmp_path / "run", data={"max_bad_fraction": 0.05})
    messages = run_ranks(_train, 2, settings)
    assert messages[0] == messages[1]
    assert "samples are unusable" in messages[0]
    assert "no_picture" in messages[0]
    assert "000003.tar" in messages[0]
    assert "000000.tar" not in messages[0]
    assert "data.max_bad_fraction" in messages[0]
    counted = json.loads((tmp_path / "run" / "faults.json").read_text())
    assert counted["samples"] >= 1000  # a thousand samples, before a fraction means anything


@pytest.mark.distributed
def test_counts_are_of_all_ranks_and_survive_a_restart(
    bad_shards: Path, tmp_path: Path, launch: Callable[[Path], None]
) -> None:
    train(recipe(bad_shards, tmp_path / "whole"))
    (tmp_path / "two.yaml").write_text(dump(recipe(bad_shards, tmp_path / "two")))
    launch(tmp_path / "two.yaml")
    parts = recipe(bad_shards, tmp_path / "parts")
    train(parts)
    for step in (30, 40):
        folder = tmp_path / "parts" / "checkpoints" / f"step-{step:08d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (tmp_path / "parts" / "faults.json").unlink()
    train(parts)
    found = [json.loads((tmp_path / run / "faults.json").read_text()) for run in ("whole", "two", "parts")]
    assert found[0] == found[1] == found[2]
    assert found[0]["by_reason"] == {"no_picture": found[0]["unusable"]}
    assert found[0]["samples"] == 1600 + found[0]["unusable"]
    assert list(found[0]["by_shard"]) == [str(bad_shards / "000003.tar")]
    for run in ("whole", "two", "parts"):
        rows = read_metrics(tmp_path / run / "metrics.jsonl")
        assert [row.get("data/bad/no_picture", 0) for row in rows] == sorted(
            row.get("data/bad/no_picture", 0) for row in rows
        )
        assert rows[-1]["data/bad/no_picture"] == found[0]["unusable"]


def test_a_stopped_run_goes_on_with_a_higher_limit(bad_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are unusable"):
        train(recipe(bad_shards, tmp_path / "run", data={"max_bad_fraction": 0.05}))
    train(recipe(bad_shards, tmp_path / "run", data={"max_bad_fraction": 0.5}))


def test_the_log_of_faults_adds_up_and_is_kept() -> None:
    one, two = FaultLog(), FaultLog()
    one.add(8, [Fault("undecodable", "a.tar", "k1"), Fault("undecodable", "a.tar", "k2")])
    two.add(4, [Fault("no_caption", "b.tar", "k3"), Fault("truncated", "a.tar", "")])
    one.merge(two)
    assert (one.samples, one.unusable) == (16, 4)
    assert one.by_reason == {"undecodable": 2, "no_caption": 1, "truncated": 1}
    assert next(iter(one.by_reason)) == "undecodable"
    assert one.by_shard == {"a.tar": 3, "b.tar": 1}
    assert one.examples["truncated"] == ["a.tar"]
    assert FaultLog.from_json(json.loads(json.dumps(one.to_json()))) == one
    one.check(0.0, num_shards=1)  # sixteen samples say nothing about a fraction
    one.add(984, [])
    one.check(0.004, num_shards=1)
    with pytest.raises(DataError, match=r"4 of 1000 samples are unusable .2 undecodable.*3 a\.tar, 1 b\.tar"):
        one.check(0.0039, num_shards=1)


def test_lost_shards_are_a_share_of_all_shards() -> None:
    """One of them is one sample to the counter, and a thousand to the run."""
    faults = FaultLog()
    faults.add(4000, [Fault("unreachable_shard", f"{i}.tar", "") for i in range(10)])
    faults.check(0.01, num_shards=1000)
    with pytest.raises(DataError, match="10 of 20 shards are out of reach"):
        faults.check(0.01, num_shards=20)


@pytest.mark.distributed
def test_ranks_that_find_other_shards_do_not_train(tmp_path: Path) -> None:
    for node, sizes in (("node0", [4, 4, 4]), ("node1", [4, 4])):
        make.write_shards(tmp_path / node, sizes)
    messages = run_ranks(_agree, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "rank 1 finds other shards than rank 0" in messages[0]


def _agree(rank: int, folder: Path) -> str:
    config = from_tree(DataConfig, {"shards": str(folder / f"node{rank}"), "lanes": 2, "workers": 0})
    try:
        loop._check_shards_agree(Loader(config, Feed(2, rank, 2, 0, 16, None), resolve(config)))
    except ConfigError as error:
        return str(error)
    return ""
