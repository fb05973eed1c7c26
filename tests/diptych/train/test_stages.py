"""A run in stages is as exact as one without: resumed, on several ranks, and at its own size behind them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diptych.testing as make
from diptych import checkpoint
from diptych.config import dump, from_tree
from diptych.data.stages import Stage
from diptych.distributed.runtime import Ranks
from diptych.errors import ConfigError
from diptych.log import read_metrics
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.train import loop
from diptych.train.recipe import Recipe
from diptych.train.stages import prepare

TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 1, "vocab_size": 49408}
VIT = {"layers": 1, "width": 32, "patch_size": 8, "image_size": 32, "head_width": 16}
CONV = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
STAGES = [{"until_samples": 28, "image_size": 16, "context_length": 4}, {"until_samples": 56, "image_size": 24}]


class PadsWithOnes:
    context_length = 16

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[5, 2] + [1] * 14 for _ in texts])


def model(vision: dict[str, Any]) -> dict[str, Any]:
    return {"towers": {"type": "open_clip", "embed_dim": 16, "vision": vision, "text": TEXT}}


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    keys = {"stages": STAGES, "ema_decay": 0.9, "model": model(VIT)}
    keys |= {"checkpoint": {"every_samples": 16, "keep_last": 10}}
    return make.tiny_recipe(shards, run, **(keys | changes))


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    average = load_file(newest / "ema.safetensors")
    return load_file(newest / "model.safetensors") | {f"ema/{name}": value for name, value in average.items()}


def losses(run: Path) -> list[float]:
    return [row["train/loss/total"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize("vision", [VIT, CONV], ids=["vit", "conv"])
@pytest.mark.parametrize("step", [2, 6, 8])  # in the first stage, in the second, behind both
def test_resume_equals_never_having_stopped(shards: Path, tmp_path: Path, vision: dict[str, Any], step: int) -> None:
    sizes = [stage | {"image_size": stage["image_size"] * vision["image_size"] // 32} for stage in STAGES]
    changes = {"model": model(vision), "stages": sizes}
    loop.train(recipe(shards, tmp_path / "whole", **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    make.forget_after(tmp_path / "parts", step)
    loop.train(recipe(shards, tmp_path / "parts", **changes))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(value.equal(parts[name]) for name, value in whole.items())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "parts")) == 10


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Side of the pictures and length of the captions of each training step, as they come."""
    found, forward = [], DualEncoder.forward

    def watched(self: DualEncoder, images: torch.Tensor, tokens: torch.Tensor, *rest: Any) -> Any:
        if self.training:
            found.append((images.shape[-1], tokens.shape[1]))
        return forward(self, images, tokens, *rest)

    monkeypatch.setattr(DualEncoder, "forward", watched)
    return found


def test_each_stage_trains_on_its_own_sizes(shards: Path, tmp_path: Path, seen: list[tuple[int, int]]) -> None:
    def evaluator(measured: DualEncoder, ranks: Ranks) -> dict[str, float]:
        with torch.no_grad():
            features = measured.encode_image(torch.zeros(1, 3, measured.image_size, measured.image_size).byte())
        return {"side": float(measured.image_size), "norm": features.norm().item()}

    loop.train(recipe(shards, tmp_path / "run", evaluate={"every_samples": 16}), evaluator)
    assert [size for size, _ in seen] == [16] * 4 + [24] * 3 + [32] * 3
    assert [length for _, length in seen] == [4] * 4 + [9] * 6
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/side" in row]
    assert [row["eval/side"] for row in rows] == [32.0] * 5


def test_samples_read_count_where_a_run_goes_back(shards: Path, tmp_path: Path, seen: list[tuple[int, int]]) -> None:
    """Back from step 9 to step 5, it goes on with the tenth batch, which lies behind the stages."""
    calls = []

    def poison(measured: DualEncoder, ranks: Ranks) -> dict[str, float]:
        calls.append(measured)
        if len(calls) == 6:
            measured.logit_scale.data.fill_(float("nan"))
        return {}

    guard, often = {"max_skipped": 3, "on_failure": "roll_back"}, {"every_samples": 8}
    changes = {"guard": guard, "evaluate": often, "checkpoint": {"every_samples": 40}, "ema_decay": None}
    loop.train(recipe(shards, tmp_path / "run", **changes), poison)
    assert [size for size, _ in seen] == [16] * 4 + [24] * 3 + [32] * (2 + 5)


def test_a_stage_of_the_models_own_sizes_changes_nothing(shards: Path, tmp_path: Path) -> None:
    own = [{"until_samples": 24}, {"until_samples": 80, "image_size": 32, "context_length": 16}]
    loop.train(recipe(shards, tmp_path / "own", stages=own))
    loop.train(recipe(shards, tmp_path / "none", stages=[]))
    assert losses(tmp_path / "own") == losses(tmp_path / "none")
    own_weights, none = weights(tmp_path / "own"), weights(tmp_path / "none")
    assert all(value.equal(none[name]) for name, value in own_weights.items())


def test_micro_batches_change_nothing_but_rounding(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "whole"))
    loop.train(recipe(shards, tmp_path / "micro", micro_batch=4))
    torch.testing.assert_close(losses(tmp_path / "micro"), losses(tmp_path / "whole"), atol=2e-5, rtol=2e-5)


def test_other_stages_are_another_run(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"other settings \(stages\.1\.image_size: 24 before, 16 now\)"):
        loop.train(recipe(shards, tmp_path / "run", stages=[STAGES[0], STAGES[1] | {"image_size": 16}]))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"until_samples": 40, "image_size": 20}], "no pictures of 20 x 20 pixels .*multiple of the patch size, 8"),
        ([{"until_samples": 40}, {"until_samples": 80, "context_length": 17}], r"\(17\).*\(16\) · stages\.1"),
    ],
)
def test_what_the_model_does_not_take_is_refused_before_the_first_step(
    shards: Path, tmp_path: Path, stages: list[dict[str, int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as problem:
        loop.train(recipe(shards, tmp_path / "run", stages=stages))
    assert "\n" not in str(problem.value)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    loop.train(recipe(shards, tmp_path / "run", total_samples=56))  # and the same folder takes what is right


def test_padding_that_looks_like_words_is_not_cut() -> None:
    built = dual_encoder.build(from_tree(ModelConfig, model(VIT)), seed=0)
    built.tokenizer = PadsWithOnes()
    prepare(built, [Stage(8), Stage(16, context_length=16)])
    with pytest.raises(ConfigError, match=r"another id than 0, .* stages\.1\.context_length"):
        prepare(built, [Stage(8), Stage(16, context_length=8)])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"until_samples": 40}, {"until_samples": 40}], "in the order of until_samples"),
        ([{"until_samples": 40}, {"until_samples": 24}], "in the order of until_samples"),
        ([{"until_samples": 88}], r"\(88\) exceeds total_samples \(80\)"),
        ([{"until_samples": 0}], "until_samples must be positive, not 0"),
        ([{"until_samples": 8, "image_size": 0}], "image_size must be positive, not 0"),
        ([{"until_samples": 8, "context_length": -1}], "context_length must be positive, not -1"),
        ([{"until_samples": 8, "size": 16}], "size"),
    ],
)
def test_stages_that_make_no_sense_are_refused(
    shards: Path, tmp_path: Path, stages: list[dict[str, int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(shards, tmp_path / "run", stages=stages)


@pytest.mark.distributed
def test_two_processes_that_divide_the_model_equal_one(
    shards: Path, tmp_path: Path, launch: Callable[..., None]
) -> None:
    """FSDP2, whose parameters are whole only within a forward pass."""
    loop.train(recipe(shards, tmp_path / "one"))
    (tmp_path / "two.yaml").write_text(dump(recipe(shards, tmp_path / "two")))
    launch(tmp_path / "two.yaml", "cpu_fsdp2")
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=2e-5, rtol=2e-5)
