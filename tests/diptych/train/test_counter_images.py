"""Pictures of wrong captions: read beside the sample, one term of the objective, the same run however it is divided."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import diptych.testing as make
from diptych import checkpoint
from diptych.config import dump, from_tree
from diptych.data.loader import build_loader
from diptych.distributed.runtime import Ranks
from diptych.errors import ConfigError
from diptych.log import read_metrics
from diptych.losses.batch import Pairs
from diptych.losses.objective import Objective, ObjectiveConfig
from diptych.models import dual_encoder
from diptych.seeding import derive
from diptych.testing import TinySample, tiny_sample
from diptych.train import loop
from diptych.train.recipe import Recipe

TERM = {"regularisers": [{"type": "counter_images", "weight": 0.5}]}


def sample(key: str, *, counter: bool, picture: bytes | None = None) -> TinySample:
    """One whose wrong caption, and the picture of it, are those of another key."""
    made = tiny_sample(key)
    if not counter:
        return made
    other = tiny_sample(f"not {key}")
    record = {"text": f"caption of not {key}", "how": "replace", "type": "object", "of": "", "image": "neg.png"}
    document = json.loads(made.members["json"]) | {"negatives": [{"text": "no picture"}, record]}
    members = made.members | {"json": json.dumps(document).encode(), "neg.png": picture or other.members["png"]}
    return TinySample(key, members)


@pytest.fixture
def countered(tmp_path: Path) -> Path:
    """Two samples of three have a counter-image."""
    for shard in range(4):
        samples = [sample(f"s{shard}-{i}", counter=i % 3 > 0) for i in range(8)]
        make.write_shard(tmp_path / "countered" / f"{shard}.tar", samples)
    return tmp_path / "countered"


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    data = {"shards": str(shards), "lanes": 4, "workers": 0, "captions": {"views": [{"columns": ["name"]}]}}
    data |= {"counter_images": True} | changes.pop("data", {})
    keys = {"total_samples": 64, "objective": TERM, "data": data, "checkpoint": {"every_samples": 32, "keep_last": 10}}
    return make.tiny_recipe(shards, run, **(keys | changes))


def losses(run: Path) -> list[float]:
    return [row["train/loss/total"] for row in read_metrics(run / "metrics.jsonl")]


def test_the_term_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text, counter, wrong = (
        F.normalize(torch.randn(5, 8, generator=generator, dtype=torch.double), dim=1).requires_grad_()
        for _ in range(4)
    )
    present = torch.tensor([True, False, True, True, False])
    scale = torch.tensor(7.0, dtype=torch.double)
    loss = Objective(from_tree(ObjectiveConfig, {"contrastive": {"weight": 0.0}} | TERM), embed_dim=8)
    known = {"counter_present": present}
    found = loss(Pairs(image, text, scale, known=known, counter_images=counter, counter_texts=wrong)).total
    parts = []
    for i in (0, 2, 3):
        for a, b, c in ((image, text, wrong), (counter, wrong, text), (text, image, counter), (wrong, counter, image)):
            logits = scale * torch.stack([a[i] @ b[i], a[i] @ c[i]])
            parts.append(F.cross_entropy(logits, torch.tensor(0)))
    expected = 0.5 * torch.stack(parts).mean()
    torch.testing.assert_close(found, expected)
    leaves: list[Tensor] = [image, text, counter, wrong]
    for mine, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert not mine[~present].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_and_captions_of_the_wrong_come_beside(countered: Path, tmp_path: Path, workers: int) -> None:
    config = recipe(countered, tmp_path / "run", data={"workers": workers})
    model = dual_encoder.build(config.model, seed=0)
    with build_loader(config.data, loop.feed_of(config, model, Ranks(0, 1))).batches() as batches:
        batch = next(batches)
    found = batch.counters
    assert found.present.tolist() == [int(key[-1]) % 3 > 0 for key in batch.keys]
    texts = [f"caption of {'not ' if there else ''}{key}" for key, there in zip(batch.keys, found.present, strict=True)]
    assert found.tokens.equal(model.tokenizer(texts)[:, : batch.tokens.shape[1]])
    ids = [
        derive(0, text) if there else own
        for text, there, own in zip(texts, found.present, batch.caption_ids, strict=True)
    ]
    assert found.caption_ids.tolist() == ids
    same = (found.images == batch.images).flatten(1).all(1)
    assert same.equal(~found.present)


PAIRS = {"contrastive": {"candidates": ["counter_pairs"], "targets": "same_caption"}}
WAYS = pytest.mark.parametrize("way", [TERM, PAIRS, TERM | PAIRS], ids=["term", "pairs", "both"])


@WAYS
def test_resumed_equals_unbroken(way: dict[str, Any], countered: Path, tmp_path: Path) -> None:
    loop.train(recipe(countered, tmp_path / "whole", objective=way))
    loop.train(recipe(countered, tmp_path / "parts", objective=way))
    make.forget_after(tmp_path / "parts", 4)
    loop.train(recipe(countered, tmp_path / "parts", objective=way))
    first, second = (
        load_file(checkpoint.newest(tmp_path / run / "checkpoints") / "model.safetensors") for run in ("whole", "parts")
    )
    assert all(value.equal(second[name]) for name, value in first.items())


@WAYS
def test_micro_batches_train_the_same(way: dict[str, Any], countered: Path, tmp_path: Path) -> None:
    loop.train(recipe(countered, tmp_path / "whole", objective=way))
    loop.train(recipe(countered, tmp_path / "parts", objective=way, micro_batch=3))
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-4, rtol=1e-4)


@pytest.mark.distributed
def test_two_processes_equal_one(countered: Path, tmp_path: Path, launch: Callable[..., None]) -> None:
    loop.train(recipe(countered, tmp_path / "one", objective=TERM | PAIRS))
    (tmp_path / "two.yaml").write_text(dump(recipe(countered, tmp_path / "two", objective=TERM | PAIRS)))
    launch(tmp_path / "two.yaml")
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=5e-5, rtol=5e-5)


@WAYS
def test_where_there_are_none_it_is_clip(way: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "with", objective=way))
    plain = {"contrastive": {"targets": way.get("contrastive", {}).get("targets", "identity")}}
    loop.train(recipe(shards, tmp_path / "without", data={"counter_images": False}, objective=plain))
    torch.testing.assert_close(losses(tmp_path / "with"), losses(tmp_path / "without"), atol=1e-5, rtol=1e-5)


def test_a_picture_that_cannot_be_decoded_is_counted(countered: Path, tmp_path: Path) -> None:
    make.write_shard(countered / "0.tar", [sample(f"x{i}", counter=i == 1, picture=b"nothing") for i in range(8)])
    run = loop.train(recipe(countered, tmp_path / "run", data={"max_bad_fraction": 1.0}))
    assert "undecodable" in (run.root / "faults.json").read_text()


def test_data_and_objective_ask_for_them_together(countered: Path, tmp_path: Path) -> None:
    for changes in ({"objective": {}}, {"data": {"counter_images": False}}):
        with pytest.raises(ConfigError, match="counter-images are brought and used together"):
            loop.train(recipe(countered, tmp_path / "run", **changes))
