"""A run with a teacher is as exact as one without: resumed, in micro-batches, on several ranks."""

import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import diptych.testing as make
from diptych import checkpoint
from diptych.config import dump, from_tree
from diptych.data.loader import build_loader
from diptych.data.reader import Feed
from diptych.data.tokens import trim
from diptych.distributed.runtime import Ranks
from diptych.errors import ConfigError
from diptych.export.to_open_clip import export
from diptych.log import read_metrics
from diptych.losses.objective import Objective
from diptych.models import dual_encoder
from diptych.models.dual_encoder import ModelConfig
from diptych.models.teacher import build_teacher, resized
from diptych.train import loop
from diptych.train.recipe import Recipe

LARGER = {
    "type": "open_clip",
    "embed_dim": 24,
    "vision": {"layers": 1, "width": 48, "patch_size": 8, "image_size": 24, "head_width": 16},
    "text": {"context_length": 7, "width": 48, "heads": 2, "layers": 1, "vocab_size": 49408},
}
SOFT = {"targets": {"type": "momentum", "share": 0.5}, "weight": 2.0}
ALL = {
    "contrastive": SOFT,
    "regularisers": [{"type": name, "teacher_dim": 24} for name in ("distillation", "interactive")],
}


@pytest.fixture
def teacher(tmp_path: Path) -> dict[str, Any]:
    """One with larger pictures, shorter captions, wider features and another scale."""
    model = dual_encoder.build(from_tree(ModelConfig, {"towers": LARGER}), seed=7)
    model.logit_scale.data.fill_(4.0)
    export(model, tmp_path / "teacher")
    return {"towers": {"type": "open_clip", "name": str(tmp_path / "teacher")}}


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    keys = {"total_samples": 64, "objective": ALL, "checkpoint": {"every_samples": 32, "keep_last": 10}}
    return make.tiny_recipe(shards, run, **(keys | changes))


def losses(run: Path) -> list[float]:
    return [row["train/loss/total"] for row in read_metrics(run / "metrics.jsonl")]


def final(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    files = sorted(newest.glob("*.safetensors"))
    return {f"{path.stem}/{name}": value for path in files for name, value in load_file(path).items()}


STAGE = {"until_samples": 8, "image_size": 8, "context_length": 3}


@pytest.mark.parametrize("stages", [[], [STAGE]], ids=["whole", "stage"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_it_sees_the_batch_with_its_own_eyes(
    shards: Path,
    tmp_path: Path,
    teacher: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    stages: list[Any],
    micro_batch: int | None,
) -> None:
    found, forward = [], Objective.forward

    def watched(self: Objective, pairs: Any, *rest: Any) -> Any:
        found.append(pairs)
        return forward(self, pairs, *rest)

    config = recipe(shards, tmp_path / "run", teacher=teacher, stages=stages, micro_batch=micro_batch)
    guide, model = build_teacher(from_tree(ModelConfig, teacher)), dual_encoder.build(config.model, seed=0)
    with build_loader(config.data, loop.feed_of(config, model, Ranks(0, 1), guide)).batches() as batches:
        batch = next(batches)
    captions = [f"caption of {key}" for key in batch.keys]
    assert batch.images.shape[-1] == (8 if stages else 16)
    with torch.no_grad():
        expected = guide.model(resized(batch.images, 24), guide.model.tokenizer(captions))
    monkeypatch.setattr(Objective, "forward", watched)
    loop.train(config)
    torch.testing.assert_close(found[0].image_known["teacher_features"], expected.image_features)
    torch.testing.assert_close(found[0].text_known["teacher_features"], expected.text_features)
    assert found[0].teacher_scale == pytest.approx(54.598, abs=1e-3)


class Letters:
    """A tokenizer that has nothing to do with the model's."""

    context_length = 30

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [[ord(letter) for letter in text][: self.context_length] for text in texts]
        return torch.tensor([row + [0] * (self.context_length - len(row)) for row in rows])


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_come_in_the_ids_of_both(shards: Path, tmp_path: Path, workers: int) -> None:
    config = recipe(shards, tmp_path / "run")
    data = from_tree(type(config.data), {"shards": str(shards), "lanes": 2, "workers": workers})
    tokenizer = dual_encoder.build(config.model, seed=0).tokenizer
    with build_loader(data, Feed(8, 0, 1, 0, 16, tokenizer, teacher_tokenizer=Letters())).batches() as batches:
        for batch in islice(batches, 3):
            captions = [f"caption of {key}" for key in batch.keys]
            assert batch.tokens.equal(trim(tokenizer(captions)))
            assert batch.teacher_tokens.equal(trim(Letters()(captions)))
    with build_loader(data, Feed(8, 0, 1, 0, 16, tokenizer)).batches() as batches:
        assert next(batches).teacher_tokens is None


@pytest.mark.parametrize("average", [None, 0.9])
def test_resumed_equals_unbroken_and_checkpoints_hold_no_teacher(
    shards: Path, tmp_path: Path, teacher: dict[str, Any], average: float | None
) -> None:
    loop.train(recipe(shards, tmp_path / "whole", teacher=teacher, ema_decay=average))
    parts = recipe(shards, tmp_path / "parts", teacher=teacher, ema_decay=average)
    loop.train(parts)
    make.forget_after(tmp_path / "parts", 4)
    loop.train(parts)
    whole, resumed = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.keys() == resumed.keys()
    assert all(value.equal(resumed[key]) for key, value in whole.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert {key.split("/")[0] for key in whole} == {"model", "objective", "optimizer"} | ({"ema"} if average else set())


def test_micro_batches_train_the_same(shards: Path, tmp_path: Path, teacher: dict[str, Any]) -> None:
    loop.train(recipe(shards, tmp_path / "whole", teacher=teacher))
    loop.train(recipe(shards, tmp_path / "parts", teacher=teacher, micro_batch=3))
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-4, rtol=1e-4)
    assert len(set(losses(tmp_path / "whole"))) == 8


ZERO3 = ("--deepspeed_config_file", "configs/deepspeed/zero3.json")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("configuration", "objective", "options"),
    [
        ("cpu", ALL, ()),
        ("cpu_fsdp2", ALL, ()),
        pytest.param("cpu_zero", {"contrastive": SOFT}, ZERO3, marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp2", "zero3"],
)
def test_two_processes_equal_one(
    shards: Path,
    tmp_path: Path,
    teacher: dict[str, Any],
    launch: Callable[..., None],
    configuration: str,
    objective: dict[str, Any],
    options: tuple[str, ...],
) -> None:
    changes = {"teacher": teacher, "objective": objective, "ema_decay": 0.9}
    loop.train(recipe(shards, tmp_path / "one", **changes))
    (tmp_path / "two.yaml").write_text(dump(recipe(shards, tmp_path / "two", **changes)))
    launch(tmp_path / "two.yaml", configuration, *options)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=5e-5, rtol=5e-5)


def test_another_teacher_is_another_run(shards: Path, tmp_path: Path, teacher: dict[str, Any]) -> None:
    config = recipe(shards, tmp_path / "run", teacher=teacher)
    loop.train(config)
    shutil.copytree(teacher["towers"]["name"], tmp_path / "other")
    other = {"towers": {"type": "open_clip", "name": str(tmp_path / "other")}}
    with pytest.raises(ConfigError, match=r"started with other settings \(teacher\.towers\.name: "):
        loop.train(recipe(shards, tmp_path / "run", teacher=other))
    with pytest.raises(ConfigError, match=r"started with other settings .*teacher: "):
        loop.train(recipe(shards, tmp_path / "run", ema_decay=None))
    loop.train(config)


def test_runs_from_before_there_were_teachers_go_on(shards: Path, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", objective={})
    loop.train(config)
    tree = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert tree.pop("teacher", None) is None
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    make.forget_after(tmp_path / "run", 4)
    loop.train(config)
    assert len(losses(tmp_path / "run")) == 8


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        ({}, "nothing in the objective asks the teacher"),
        (
            {"regularisers": ["distillation"]},
            "have 24 numbers, distillation compares them with 16 .* `teacher_dim: 24`",
        ),
        ({"regularisers": [{"type": "interactive", "teacher_dim": 20}]}, "interactive compares them with 20"),
        ({"contrastive": {"candidates": ["queue"]}}, "queue compares them with 16"),
    ],
    ids=["nobody", "distillation", "interactive", "queue"],
)
def test_objectives_that_do_not_fit_are_refused(
    shards: Path, tmp_path: Path, teacher: dict[str, Any], objective: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        loop.train(recipe(shards, tmp_path / "run", teacher=teacher, objective=objective))


def test_an_average_is_as_wide_as_the_model(shards: Path, tmp_path: Path) -> None:
    term = {"type": "distillation", "teacher_dim": 24}
    with pytest.raises(ConfigError, match="have 16 numbers, distillation compares them with 24"):
        loop.train(recipe(shards, tmp_path / "run", ema_decay=0.9, objective={"regularisers": [term]}))
