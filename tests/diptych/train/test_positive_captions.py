"""Captions beside the one a picture is trained with, right and wrong: read, told apart, exact in a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diptych.testing as make
from diptych.config import dump
from diptych.data.loader import build_loader
from diptych.distributed.runtime import Ranks
from diptych.errors import ConfigError
from diptych.log import read_metrics
from diptych.models import dual_encoder
from diptych.seeding import derive
from diptych.testing import TinySample, tiny_sample
from diptych.train import loop
from diptych.train.recipe import Recipe

CONTRASTIVE = {"candidates": ["own_hard_captions", "positive_captions"], "targets": "same_caption"}
CAPTIONS = {
    "views": [{"columns": ["name"]}],
    "hard": {"column": "hard", "count": 2},
    "positive": {"columns": ["sub", "paraphrase"], "count": 3},
}


def sample(shard: int, number: int) -> TinySample:
    """Every third has no further captions, every third one alone."""
    made = tiny_sample(f"s{shard}-{number}")
    captions = {"name": f"fox {number % 3}", "hard": [f"wolf {number}", "bear"]}
    if number % 3:
        captions["sub"] = ["fox"]
    if number % 3 == 2:
        captions["paraphrase"] = [f"a fox, {number}", "one fox", "some fox"]
    return TinySample(made.key, made.members | {"json": json.dumps({"captions": captions}).encode()})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(4):
        make.write_shard(tmp_path / "shards" / f"{shard}.tar", [sample(shard, i) for i in range(8)])
    return tmp_path / "shards"


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    data = {"shards": str(shards), "lanes": 4, "workers": 0, "captions": CAPTIONS} | changes.pop("data", {})
    keys = {"total_samples": 64, "objective": {"contrastive": CONTRASTIVE}, "data": data}
    return make.tiny_recipe(shards, run, **(keys | {"checkpoint": {"every_samples": 32, "keep_last": 10}} | changes))


def losses(run: Path) -> list[float]:
    return [row["train/loss/total"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("workers", [0, 2])
def test_they_come_beside_the_caption(workers: int, shards: Path, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", data={"workers": workers})
    model = dual_encoder.build(config.model, seed=0)
    with build_loader(config.data, loop.feed_of(config, model, Ranks(0, 1))).batches() as batches:
        batch = next(batches)
    length = batch.tokens.shape[1]

    def tokens(*texts: str) -> list[list[int]]:
        return sorted(model.tokenizer(texts)[:, :length].tolist())

    for row, key in enumerate(batch.keys):
        number = int(key[-1])
        assert sorted(batch.hard_tokens[row].tolist()) == tokens(f"wolf {number}", "bear")
        assert sorted(batch.hard_ids[row].tolist()) == sorted(derive(0, text) for text in (f"wolf {number}", "bear"))
        found = sorted(batch.positive_tokens[row].tolist())
        if number % 3 == 2:  # three of four, none of them twice
            assert len({tuple(ids) for ids in found}) == 3
            assert all(ids in tokens("fox", f"a fox, {number}", "one fox", "some fox") for ids in found)
        else:
            assert found == tokens(*["fox" if number % 3 else "fox 0"] * 3)


def test_resumed_equals_unbroken_and_another_run_than_without(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "whole"))
    loop.train(recipe(shards, tmp_path / "parts"))
    make.forget_after(tmp_path / "parts", 4)
    loop.train(recipe(shards, tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    contrastive = CONTRASTIVE | {"candidates": ["own_hard_captions"]}
    captions = {name: value for name, value in CAPTIONS.items() if name != "positive"}
    loop.train(
        recipe(shards, tmp_path / "without", objective={"contrastive": contrastive}, data={"captions": captions})
    )
    assert losses(tmp_path / "whole")[0] != losses(tmp_path / "without")[0]


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_train_the_same(size: int, shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "whole"))
    loop.train(recipe(shards, tmp_path / "parts", micro_batch=size))
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-4, rtol=1e-4)


@pytest.mark.distributed
def test_two_processes_train_like_one(shards: Path, tmp_path: Path, launch: Callable[..., None]) -> None:
    contrastive = CONTRASTIVE | {"candidates": ["hard_captions", "positive_captions"]}
    loop.train(recipe(shards, tmp_path / "one", objective={"contrastive": contrastive}))
    (tmp_path / "two.yaml").write_text(dump(recipe(shards, tmp_path / "two", objective={"contrastive": contrastive})))
    launch(tmp_path / "two.yaml")
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=5e-5, rtol=5e-5)


def test_data_and_objective_ask_for_them_together(shards: Path, tmp_path: Path) -> None:
    captions = {name: value for name, value in CAPTIONS.items() if name != "positive"}
    for changes in ({"objective": {}}, {"data": {"captions": captions}}):
        with pytest.raises(ConfigError, match="further right captions are brought and used together"):
            loop.train(recipe(shards, tmp_path / "run", **changes))
    sources = [
        {"name": str(n), "shards": str(shards), "captions": CAPTIONS | {"positive": {"count": n}}} for n in (1, 2)
    ]
    with pytest.raises(ConfigError, match="as many hard and further right captions"):
        recipe(shards, tmp_path / "run", data={"shards": None, "sources": sources})
