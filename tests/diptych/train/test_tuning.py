"""Tuning is training: exact when resumed, in micro-batches, on several ranks, whatever learns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diptych.testing as make
from diptych import checkpoint
from diptych.config import dump
from diptych.encoder import load
from diptych.errors import CheckpointError, ConfigError, DataError
from diptych.log import read_metrics
from diptych.testing import TINY_MODEL, tiny_sample
from diptych.train import loop
from diptych.train.recipe import Recipe

NAMES = ["red fox", "blue cat", "blue guinea pig"]
LORA = {"type": "lora", "rank": 2}
OVER_CLASSES = {"contrastive": {"weight": 0.0}, "regularisers": [{"type": "classification"}]}


def prompts(**keys: Any) -> dict[str, Any]:
    given = {"type": "context", "length": 2, "classes": NAMES} | keys
    return {key: value for key, value in given.items() if value is not None or key == "words"}


PAIRS = {"attributes": ["red", "blue"], "objects": ["fox", "cat", "guinea pig"], "length": None}
GROUPS = [["a photo of {}.", "a picture of {}."], ["{} in snow"], ["the {} here"]]
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "lora": ([LORA], {}),
    "context": ([prompts()], OVER_CLASSES),
    "lora over classes": ([LORA, {"type": "class_names", "classes": NAMES}], OVER_CLASSES),
    "classifier": ([{"type": "classifier", "classes": NAMES}], OVER_CLASSES),
    "conditional_context": ([prompts(type="conditional_context", words=None)], OVER_CLASSES),
    "compositional": ([prompts(type="compositional", dropout=0.0, **PAIRS)], OVER_CLASSES),
    "mixture": ([prompts(type="mixture", groups=GROUPS, length=None)], OVER_CLASSES),
    "class_aware": ([prompts(type="class_aware", words=None)], OVER_CLASSES),
    "text_tokens": ([{"type": "text_tokens", "length": 2}], {}),
    "visual_prompts": ([{"type": "visual_prompts", "length": 2}], {}),
}
MARKS = {
    "lora": "lora_",
    "lora over classes": "lora_",
    "text_tokens": "learned_tokens",
    "visual_prompts": "learned_tokens",
}
"""What is in the name of each parameter that learns; `class_prompts` where nothing is said."""
DEEP = ("text_tokens", "visual_prompts")
"""What enters layers that repeat."""


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    for shard in range(4):
        samples = [tiny_sample(f"s{shard}-{i}", caption=NAMES[i % 3], label=i % 3) for i in range(8)]
        make.write_shard(tmp_path / "labelled" / f"{shard}.tar", samples)
    return tmp_path / "labelled"


def recipe(shards: Path, run: Path, kind: str, **changes: Any) -> Recipe:
    adapters, objective = KINDS[kind]
    data = {"shards": str(shards), "lanes": 4, "workers": 0, "labels": True}
    towers = TINY_MODEL["towers"]
    if kind in DEEP:
        towers = towers | {side: towers[side] | {"layers": 2} for side in ("vision", "text")}
    model = {"towers": towers, "adapters": adapters}
    keys = {"total_samples": 64, "model": model, "objective": objective, "data": data}
    return make.tiny_recipe(shards, run, **(keys | {"checkpoint": {"every_samples": 32, "keep_last": 10}} | changes))


def losses(run: Path) -> list[float]:
    return [row["train/loss/total"] for row in read_metrics(run / "metrics.jsonl")]


def weights(run: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    return load_file(newest / f"{stem}.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_unbroken_and_only_what_is_added_learns(kind: str, labelled: Path, tmp_path: Path) -> None:
    loop.train(recipe(labelled, tmp_path / "whole", kind))
    config = recipe(labelled, tmp_path / "parts", kind)
    loop.train(config)
    make.forget_after(tmp_path / "parts", 4)
    loop.train(config)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(value.equal(parts[name]) for name, value in whole.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    learned = {name.rpartition("/")[0] for name in weights(tmp_path / "whole", "optimizer")}
    assert learned
    assert all(MARKS.get(kind, "class_prompts") in name for name in learned)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_train_the_same(kind: str, labelled: Path, tmp_path: Path) -> None:
    loop.train(recipe(labelled, tmp_path / "whole", kind))
    loop.train(recipe(labelled, tmp_path / "parts", kind, micro_batch=3))
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-4, rtol=1e-4)
    assert len(set(losses(tmp_path / "whole"))) == 8


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "configuration"),
    [
        ("lora", "cpu"),
        pytest.param("lora", "cpu_fsdp2", marks=pytest.mark.slow),
        ("context", "cpu"),
        ("lora over classes", "cpu_fsdp2"),
        pytest.param("context", "cpu_zero", marks=pytest.mark.slow),
        ("mixture", "cpu"),
        ("visual_prompts", "cpu_fsdp2"),
        *(
            pytest.param(kind, way, marks=pytest.mark.slow)
            for kind in ("conditional_context", "compositional", "mixture", "class_aware", *DEEP)
            for way in ("cpu", "cpu_fsdp2", "cpu_zero")
            if (kind, way) not in (("mixture", "cpu"), ("visual_prompts", "cpu_fsdp2"))
        ),
    ],
)
def test_two_processes_equal_one(
    kind: str, configuration: str, labelled: Path, tmp_path: Path, launch: Callable[..., None]
) -> None:
    loop.train(recipe(labelled, tmp_path / "one", kind))
    (tmp_path / "two.yaml").write_text(dump(recipe(labelled, tmp_path / "two", kind)))
    launch(tmp_path / "two.yaml", configuration)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=5e-5, rtol=5e-5)


def test_a_run_is_tuned_and_opened_with_its_adapters(labelled: Path, tmp_path: Path) -> None:
    base = loop.train(recipe(labelled, tmp_path / "base", "lora", model=TINY_MODEL, objective={}))
    towers = {"type": "run", "run": str(base.root)}
    keys = {"model": {"towers": towers, "adapters": [LORA]}, "total_samples": 32}
    tuned = loop.train(recipe(labelled, tmp_path / "tuned", "lora", **keys))
    again = loop.train(recipe(labelled, tmp_path / "again", "lora", **(keys | {"model": {"towers": towers}})))
    chained = {"type": "run", "run": str(tuned.root)}
    more = loop.train(
        recipe(labelled, tmp_path / "more", "lora", **(keys | {"model": {"towers": chained, "adapters": [LORA]}}))
    )
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = {run.root.name: load(str(run.root)).encode_image(images) for run in (base, tuned, again, more)}
    assert len({tuple(found.flatten().tolist()) for found in features.values()}) == 4
    scales = {run.root.name: float(load(str(run.root)).logit_scale) for run in (base, tuned)}
    assert scales["base"] == pytest.approx(scales["tuned"])  # frozen with all that is the base's


def test_no_base_is_one_line(labelled: Path, tmp_path: Path) -> None:
    towers = {"type": "run", "run": str(tmp_path / "nowhere")}
    with pytest.raises(CheckpointError, match=r"not a run, there is no config.yaml · .*nowhere · check the path"):
        loop.train(recipe(labelled, tmp_path / "run", "lora", model={"towers": towers}))


def test_what_does_not_go_together_is_refused(labelled: Path, tmp_path: Path) -> None:
    few = TINY_MODEL | {"adapters": [prompts(classes=NAMES[:2])]}
    with pytest.raises(DataError, match=r"class 2 of sample 's\d-\d', and there are 2 names"):
        loop.train(recipe(labelled, tmp_path / "a", "context", model=few))
    with pytest.raises(ConfigError, match="nothing in the objective teaches the prompts of classes"):
        loop.train(recipe(labelled, tmp_path / "b", "context", objective={}))
    with pytest.raises(ConfigError, match="has the term classification, and the model has no prompts of classes"):
        loop.train(recipe(labelled, tmp_path / "c", "context", model=TINY_MODEL))
    data = {"shards": str(labelled), "lanes": 4, "workers": 0}
    with pytest.raises(ConfigError, match=r"uses classes and the data brings none · data\.labels"):
        loop.train(recipe(labelled, tmp_path / "d", "context", data=data))


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1.5"])
def test_samples_without_a_class_are_counted(text: bytes, labelled: Path, tmp_path: Path) -> None:
    samples = [tiny_sample(f"s4-{i}", caption=NAMES[0], label=0) for i in range(4)]
    samples[1].members["cls"] = text
    make.write_shard(labelled / "3.tar", samples)
    data = {"shards": str(labelled), "lanes": 4, "workers": 0, "labels": True, "max_bad_fraction": 1.0}
    run = loop.train(recipe(labelled, tmp_path / "run", "context", data=data))
    assert "bad_label" in (run.root / "faults.json").read_text()
