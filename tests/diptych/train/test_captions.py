"""CoCa in training: both losses fall, and runs are as exact as others: resumed, in micro-batches, on several ranks."""

import shutil
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
from diptych.errors import ConfigError
from diptych.log import read_metrics
from diptych.losses.batch import Pairs
from diptych.losses.objective import Objective, ObjectiveConfig
from diptych.models import dual_encoder
from diptych.models.captions import next_words
from diptych.models.dual_encoder import ModelConfig
from diptych.models.matching import DecoderTexts
from diptych.testing import TINY_CAPTIONER, run_ranks
from diptych.train import loop
from diptych.train.recipe import Recipe
from diptych.vocabulary import IGNORED, TokenLoss

COCA = {"regularisers": [{"type": "caption", "label_smoothing": 0.1, "z_loss": 1e-4}]}
WEIGHT = 2.0


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of samples with captions of two to seven words, and others."""
    for number in range(4):
        samples = [
            make.tiny_sample(
                f"s{number}{i}",
                caption=" ".join(["a red fox on the grass"[: 2 + 4 * (i % 6)], str(i)]),
                hard=[f"the long caption of picture {i}"[: 18 + 3 * i]],
            )
            for i in range(8)
        ]
        make.write_shard(tmp_path / "shards" / f"{number:06d}.tar", samples)
    return tmp_path / "shards"


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    keys = {
        "total_samples": 64,
        "model": TINY_CAPTIONER,
        "objective": COCA,
        "checkpoint": {"every_samples": 32, "keep_last": 10},
        "optim": {"peak_lr": 3e-3, "schedule": {"warmup_samples": 16}},
    }
    return make.tiny_recipe(shards, run, **(keys | changes))


def column(run: Path, name: str = "total") -> list[float]:
    return [row[f"train/loss/{name}"] for row in read_metrics(run / "metrics.jsonl")]


def final(run: Path) -> dict[str, Tensor]:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    files = sorted(newest.glob("*.safetensors"))
    return {f"{path.stem}/{name}": value for path in files for name, value in load_file(path).items()}


def test_resumed_equals_unbroken(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "whole", ema_decay=0.9))
    parts = recipe(shards, tmp_path / "parts", ema_decay=0.9)
    loop.train(parts)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000008")  # as if the run had died after step 4
    loop.train(parts)
    whole, resumed = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.keys() == resumed.keys()
    assert "model/text_decoder.text_projection" in whole
    assert all(value.equal(resumed[key]) for key, value in whole.items())
    assert column(tmp_path / "whole") == column(tmp_path / "parts")
    assert column(tmp_path / "whole", "caption")[-1] < column(tmp_path / "whole", "caption")[0] - 1


@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_train_the_same(size: int, shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "whole"))
    loop.train(recipe(shards, tmp_path / "parts", micro_batch=size))
    for name in ("total", "caption"):
        torch.testing.assert_close(
            column(tmp_path / "parts", name), column(tmp_path / "whole", name), atol=1e-4, rtol=1e-4
        )


LONG = {"columns": ["hard"]}
SECOND = {"regularisers": [COCA["regularisers"][0] | {"view": "second"}]}


def with_captions(shards: Path, **captions: Any) -> dict[str, Any]:
    return {"data": {"shards": str(shards), "lanes": 4, "workers": 0, "captions": captions}}


def two_captions(shards: Path, run: Path, second: dict[str, Any] = LONG, **changes: Any) -> Recipe:
    return recipe(shards, run, objective=SECOND, **with_captions(shards, second_views=[second]), **changes)


def test_other_captions_are_foretold_than_contrasted(shards: Path, tmp_path: Path) -> None:
    loop.train(two_captions(shards, tmp_path / "both"))
    loop.train(recipe(shards, tmp_path / "short"))
    loop.train(recipe(shards, tmp_path / "long", **with_captions(shards, views=[LONG])))
    first = {run: [column(tmp_path / run, name)[0] for name in ("contrastive", "caption")] for run in ("short", "long")}
    found = [column(tmp_path / "both", name)[0] for name in ("contrastive", "caption")]
    assert found == pytest.approx([first["short"][0], first["long"][1]], abs=1e-5)
    assert abs(found[0] - first["long"][0]) > 1e-3
    assert abs(found[1] - first["short"][1]) > 1e-3
    assert column(tmp_path / "both", "caption")[-1] < found[1] - 1


def test_a_second_caption_that_is_the_first_changes_nothing(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "one"))
    loop.train(two_captions(shards, tmp_path / "two", {"columns": ["txt"]}))
    for name in ("total", "caption"):
        torch.testing.assert_close(column(tmp_path / "two", name), column(tmp_path / "one", name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_second_captions_come_in_micro_batches_too(size: int, shards: Path, tmp_path: Path) -> None:
    loop.train(two_captions(shards, tmp_path / "whole"))
    loop.train(two_captions(shards, tmp_path / "parts", micro_batch=size))
    for name in ("total", "caption"):
        torch.testing.assert_close(
            column(tmp_path / "parts", name), column(tmp_path / "whole", name), atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_captions_of_the_first_pictures_alone_are_foretold() -> None:
    model = dual_encoder.build(from_tree(ModelConfig, TINY_CAPTIONER), seed=0).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    short, long = model.tokenizer(["fox", "cat", "a red fox"])[:, :5], model.tokenizer(["a red fox", "the cat in snow"])
    found = model(images, short, None, TokenLoss(), None, DecoderTexts(long))
    alone = model(images[:2], long, None, TokenLoss())
    torch.testing.assert_close(found.caption_losses, alone.caption_losses, atol=1e-5, rtol=1e-5)
    assert found.caption_lengths.equal(alone.caption_lengths)
    assert found.text_features.equal(model.encode_text(short))


ZERO3 = ("--deepspeed_config_file", "configs/deepspeed/zero3.json")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("configuration", "size", "options"),
    [
        ("cpu", None, ()),
        ("cpu_fsdp2", 2, ()),
        pytest.param("cpu", 2, (), marks=pytest.mark.slow),
        pytest.param("cpu_fsdp2", None, (), marks=pytest.mark.slow),
        pytest.param("cpu_zero", None, ZERO3, marks=pytest.mark.slow),
        pytest.param("cpu_zero", 2, ZERO3, marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp2-parts", "ddp-parts", "fsdp2", "zero3", "zero3-parts"],
)
@pytest.mark.parametrize("second", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first", "second"])
def test_two_processes_train_like_one(
    second: bool,
    configuration: str,
    size: int | None,
    options: tuple[str, ...],
    shards: Path,
    tmp_path: Path,
    launch: Callable[..., None],
) -> None:
    make_recipe = two_captions if second else recipe
    loop.train(make_recipe(shards, tmp_path / "one"))
    two = make_recipe(shards, tmp_path / "two", micro_batch=size)
    (tmp_path / "two.yaml").write_text(dump(two))
    launch(tmp_path / "two.yaml", configuration, *options)
    for name in ("total", "caption"):
        torch.testing.assert_close(column(tmp_path / "two", name), column(tmp_path / "one", name), atol=1e-4, rtol=1e-4)


def test_bf16_trains(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "low", precision="bf16"))
    loop.train(recipe(shards, tmp_path / "whole"))
    low, whole = (torch.tensor(column(tmp_path / name, "caption")) for name in ("low", "whole"))
    assert (low - whole).abs().max() < 0.1


@pytest.mark.parametrize("key", ["speed", "frozen_decoder", "frozen_image_tower"])
def test_options_of_training_hold_for_captioners(key: str, shards: Path, tmp_path: Path) -> None:
    deep = TINY_CAPTIONER["towers"] | {
        "text": TINY_CAPTIONER["towers"]["text"] | {"layers": 2},
        "vision": TINY_CAPTIONER["towers"]["vision"] | {"layers": 2},
    }
    changes: dict[str, Any] = {
        "speed": {"model": {"towers": deep}, "speed": {"checkpoint_activations": True}},
        "frozen_decoder": {"model": TINY_CAPTIONER | {"frozen": ["text_decoder"]}, "objective": {}},
        "frozen_image_tower": {"model": TINY_CAPTIONER | {"frozen": ["image_tower"]}},
    }[key]
    loop.train(recipe(shards, tmp_path / "run", **changes))
    if key == "speed":
        loop.train(recipe(shards, tmp_path / "plain", **(changes | {"speed": {}})))
        torch.testing.assert_close(column(tmp_path / "run"), column(tmp_path / "plain"), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused_before_training(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no decoder"):
        loop.train(recipe(shards, tmp_path / "run", model=make.TINY_MODEL))
    with pytest.raises(ConfigError, match="second captions are brought and used together"):
        loop.train(recipe(shards, tmp_path / "run", objective=SECOND))
    with pytest.raises(ConfigError, match="second captions are brought and used together"):
        loop.train(recipe(shards, tmp_path / "run", **with_captions(shards, second_views=[LONG])))
    with pytest.raises(ConfigError, match="add caption, or freeze it"):
        loop.train(recipe(shards, tmp_path / "run", objective={}))


# --- the term itself, against a dense float64 twin -----------------------------------------------------------------


def on_rank(rank: int, world: int) -> tuple[float, dict[str, Tensor]]:
    """The objective's value and the gradients of the rows that fall on a rank."""
    torch.manual_seed(0)
    model = dual_encoder.build(from_tree(dual_encoder.ModelConfig, TINY_CAPTIONER), seed=0).double().eval()
    tree = {"contrastive": {"weight": 0.0}, **COCA}
    config = from_tree(ObjectiveConfig, tree)
    objective = Objective(config, embed_dim=32).double()
    images, tokens = rows(model)
    each = len(images) // world
    mine = slice(rank * each, (rank + 1) * each)
    found = model(images[mine], tokens[mine], None, config.caption)
    total = objective(Pairs(**found._asdict())).total
    total.backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return total.item(), {name: grads[name] for name in WATCHED}


WATCHED = ("text_decoder.text_projection", "image_tower.conv1.weight", "text_tower.token_embedding.weight")


def rows(model: dual_encoder.DualEncoder) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, model.tokenizer(["fox", "a red fox on the grass", "a fox", "the cat sees the red fox and its den"])


@pytest.mark.distributed
def test_the_term_equals_its_dense_twin_on_any_number_of_ranks() -> None:
    model = dual_encoder.build(from_tree(dual_encoder.ModelConfig, TINY_CAPTIONER), seed=0).double().eval()
    images, tokens = rows(model)
    logits, targets = model.next_word_logits(images, tokens).flatten(0, 1), next_words(tokens).flatten()
    dense = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=0.1)
    dense = dense + 1e-4 * (logits[targets != IGNORED].logsumexp(1) ** 2).mean()
    (WEIGHT * dense).backward()
    parameters = dict(model.named_parameters())
    for world in (1, 2, 4):
        found = run_ranks(on_rank, world, world) if world > 1 else [on_rank(0, 1)]
        assert sum(value for value, _ in found) / world == pytest.approx(WEIGHT * dense.item(), rel=1e-6)
        for name in WATCHED:
            mean = torch.stack([gradients[name] for _, gradients in found]).mean(0)
            gradient = parameters[name].grad
            assert gradient is not None
            torch.testing.assert_close(mean, gradient.float(), atol=1e-6, rtol=1e-4)
