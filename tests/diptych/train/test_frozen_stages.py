"""First what stands on a tower, then the tower too: as exact as any run, and each stage trains what it says."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diptych.testing as make
from diptych.cli import main
from diptych.config import dump
from diptych.errors import ConfigError
from diptych.models.dual_encoder import DualEncoder
from diptych.testing import TINY_MODEL, tiny_sample
from diptych.train import loop
from diptych.train.recipe import Recipe

NAMES = ["red fox", "blue cat", "blue guinea pig"]
HEAD = "class_prompts.rows.weight"
STAGES = [{"until_samples": 32, "frozen": ["image_tower"]}]
"""Of ten steps the first four."""


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    for shard in range(4):
        samples = [tiny_sample(f"s{shard}-{i}", caption=NAMES[i % 3], label=i % 3) for i in range(8)]
        make.write_shard(tmp_path / "labelled" / f"{shard}.tar", samples)
    return tmp_path / "labelled"


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    model = TINY_MODEL | {"adapters": [{"type": "classifier", "classes": NAMES}], "unfrozen": ["image_tower"]}
    keys = {
        "model": model,
        "stages": STAGES,
        "ema_decay": 0.9,
        "objective": {"contrastive": {"weight": 0.0}, "regularisers": [{"type": "classification"}]},
        "data": {"shards": str(shards), "lanes": 4, "workers": 0, "labels": True},
        "checkpoint": {"every_samples": 8, "keep_last": 20},
    }
    return make.tiny_recipe(shards, run, **(keys | changes))


def at(run: Path, step: int, stem: str = "model") -> dict[str, torch.Tensor]:
    (folder,) = [f for f in (run / "checkpoints").glob("step-*") if int(f.name.removeprefix("step-")) == step]
    return load_file(folder / f"{stem}.safetensors")


def changed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    return {name if name == HEAD else name.partition(".")[0] for name in first if not first[name].equal(second[name])}


def test_each_stage_trains_what_it_says(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], DualEncoder.forward

    def watched(self: DualEncoder, *args: Any, **keys: Any) -> Any:
        if self.training:
            seen.append((self.image_tower.training, {n for n, p in self.named_parameters() if p.requires_grad}))
        return forward(self, *args, **keys)

    monkeypatch.setattr(DualEncoder, "forward", watched)
    run = tmp_path / "run"
    loop.train(recipe(labelled, run))
    towers = [{name.partition(".")[0] for name in learning} for _, learning in seen]
    assert towers == [{"class_prompts"}] * 4 + [{"class_prompts", "image_tower"}] * 6
    assert [training for training, _ in seen] == [False] * 4 + [True] * 6
    assert changed(at(run, 1), at(run, 4)) == {HEAD}
    assert changed(at(run, 4), at(run, 5)) == {HEAD, "image_tower"}
    assert {name.rpartition("/")[0] for name in at(run, 4, "optimizer")} == {HEAD}
    steps = {name: int(value) for name, value in at(run, 10, "optimizer").items() if name.endswith("/step")}
    assert steps.pop(f"{HEAD}/step") == 10
    assert set(steps.values()) == {6}


def test_the_first_stage_is_a_run_with_the_tower_frozen(labelled: Path, tmp_path: Path) -> None:
    loop.train(recipe(labelled, tmp_path / "stages"))
    alone = TINY_MODEL | {"adapters": [{"type": "classifier", "classes": NAMES}]}
    loop.train(recipe(labelled, tmp_path / "alone", model=alone, stages=[]))
    for stem in ("model", "ema"):
        assert not changed(at(tmp_path / "stages", 4, stem), at(tmp_path / "alone", 4, stem))
    assert HEAD in changed(at(tmp_path / "stages", 10), at(tmp_path / "alone", 10))


@pytest.mark.parametrize("step", [2, 4, 5, 8])  # within the first stage, at its end, behind it
def test_resume_equals_never_having_stopped(labelled: Path, tmp_path: Path, step: int) -> None:
    loop.train(recipe(labelled, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    make.forget_after(tmp_path / "parts", step)
    loop.train(recipe(labelled, tmp_path / "parts"))
    for stem in ("model", "ema", "optimizer"):
        assert not changed(at(tmp_path / "whole", 10, stem), at(tmp_path / "parts", 10, stem))


def test_micro_batches_train_the_same(labelled: Path, tmp_path: Path) -> None:
    loop.train(recipe(labelled, tmp_path / "whole"))
    loop.train(recipe(labelled, tmp_path / "parts", micro_batch=3))
    parts = at(tmp_path / "parts", 10)
    for name, value in at(tmp_path / "whole", 10).items():
        torch.testing.assert_close(parts[name], value, atol=1e-3, rtol=1e-3)  # Adam makes much of rounding


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"until_samples": 8, "frozen": ["image_towr"]}], r"'image_towr' · stages\.0\.frozen · did you mean 'image_"),
        ([{"until_samples": 8, "frozen": ["text_tower"]}], r"'text_tower' · stages\.0\.frozen"),
        ([{"until_samples": 8, "frozen": ["image_tower", "class_prompts"]}], r"left to train · stages\.0\.frozen"),
    ],
)
def test_what_is_no_stage_is_one_line(labelled: Path, tmp_path: Path, stages: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        loop.train(recipe(labelled, tmp_path / "run", stages=stages))
    assert "\n" not in str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize("micro_batch", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_equal_one(
    micro_batch: int | None, labelled: Path, tmp_path: Path, launch: Callable[..., None]
) -> None:
    loop.train(recipe(labelled, tmp_path / "one"))
    (tmp_path / "two.yaml").write_text(dump(recipe(labelled, tmp_path / "two", micro_batch=micro_batch)))
    launch(tmp_path / "two.yaml", "cpu")
    two = at(tmp_path / "two", 10)
    for name, value in at(tmp_path / "one", 10).items():
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=1e-3)  # as above
    assert changed(at(tmp_path / "two", 1), at(tmp_path / "two", 4)) == {HEAD}


@pytest.mark.distributed
def test_slices_are_refused(labelled: Path, tmp_path: Path, launch: Callable[..., None]) -> None:
    (tmp_path / "two.yaml").write_text(dump(recipe(labelled, tmp_path / "two")))
    with pytest.raises(AssertionError, match="slices learn all the time · stages: frozen"):
        launch(tmp_path / "two.yaml", "cpu_fsdp2")


def test_rows_have_no_place_in_an_export(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.train(recipe(labelled, tmp_path / "run", total_samples=40))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "open_clip"]) == 2
    assert "what 'classifier' learned is no change of the model's weights" in capsys.readouterr().err
