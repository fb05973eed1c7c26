"""Image-text matching: which pairs are asked about, the term, and runs as exact as others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import diptych.testing as make
from diptych.config import dump, from_tree
from diptych.distributed.groups import ALONE, world_group
from diptych.errors import ConfigError
from diptych.log import read_metrics
from diptych.losses.batch import Pairs
from diptych.losses.objective import Objective, ObjectiveConfig
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.matching import DecoderTexts, WrongPairs
from diptych.models.run import open_run
from diptych.testing import TINY_CAPTIONER, run_ranks
from diptych.train import loop, partners
from diptych.train.recipe import Recipe

MATCHER = TINY_CAPTIONER | {"matching": True}
TERMS = {"regularisers": [{"type": "caption"}, {"type": "matching", "weight": 2.0}]}


# --- which pairs ----------------------------------------------------------------------------------------------------


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_partners_are_drawn_with_the_softmax_among_other_captions() -> None:
    image, text, scale = unit(6, 4, seed=0), unit(6, 4, seed=1), torch.tensor(3.0)
    ids = torch.tensor([0, 1, 2, 1, 3, 4])
    count = 4000
    drawn = [partners.draw(image, text, scale, ids, ALONE, seed=seed) for seed in range(count)]
    for name, logits in (("text_of_image", image @ text.T), ("image_of_text", text @ image.T)):
        places = torch.stack([getattr(each, name) for each in drawn], 1)
        shares = torch.stack([(places == j).double().mean(1) for j in range(6)], 1)
        wanted = (scale * logits).double().masked_fill(ids[:, None] == ids, -torch.inf).softmax(1)
        assert not shares[ids[:, None] == ids].any()
        assert (shares - wanted).abs().max() < 5 * (0.25 / count) ** 0.5  # five standard errors
    assert not torch.equal(drawn[0].text_of_image, drawn[0].image_of_text)


def test_where_all_captions_are_equal_there_is_no_partner() -> None:
    found = partners.draw(unit(3, 4, seed=0), unit(3, 4, seed=1), torch.tensor(9.0), torch.zeros(3), ALONE, seed=0)
    assert found.text_of_image.tolist() == found.image_of_text.tolist() == [-1, -1, -1]
    pairs = partners.wrong_pairs(found, torch.ones(3, 5, dtype=torch.long), ALONE)
    assert len(pairs.images) == 0
    assert pairs.tokens.shape == (0, 5)


def pairs_on_rank(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """The wrong pairs of a rank's pictures, these numbered as in the whole batch; texts of another length on each."""
    image, text, tokens = unit(8, 4, seed=0), unit(8, 4, seed=1), torch.arange(1, 9)[:, None].expand(8, 3)
    mine = slice(rank, None, world)  # samples are dealt in turn
    drawn = partners.draw(image[mine], text[mine], torch.tensor(5.0), torch.arange(8)[mine], world_group(), seed=3)
    found = partners.wrong_pairs(drawn, tokens[mine, : 3 - rank % 2], world_group())
    return found.images * world + rank, found.tokens[:, 0]


@pytest.mark.distributed
def test_pairs_are_the_same_on_any_number_of_ranks() -> None:
    alone = sorted(zip(*(part.tolist() for part in pairs_on_rank(0, 1)), strict=True))
    assert len(alone) == 16
    for world in (2, 4):
        found = run_ranks(pairs_on_rank, world, world)
        pairs = [pair for images, texts in found for pair in zip(images.tolist(), texts.tolist(), strict=True)]
        assert sorted(pairs) == alone


def test_parts_are_numbered_from_their_beginnings() -> None:
    pairs = WrongPairs(torch.tensor([0, 0, 2, 6]), torch.arange(8).view(4, 2))
    first, second, third = partners.divided(pairs, [3, 3, 1])
    assert first.images.tolist() == [0, 0, 2]
    assert second.images.tolist() == []
    assert third.images.tolist() == [0]
    assert third.tokens.tolist() == [[6, 7]]


# --- the term -------------------------------------------------------------------------------------------------------


def matcher() -> DualEncoder:
    return dual_encoder.build(from_tree(ModelConfig, MATCHER), seed=0).double().eval()


def rows(model: DualEncoder) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, model.tokenizer(["fox", "a red fox! on the grass !", "a fox"])


def test_the_term_is_its_formula() -> None:
    model = matcher()
    images, tokens = rows(model)
    wrong = WrongPairs(torch.tensor([0, 0, 2]), tokens[[1, 2, 0]])
    found = model(images, tokens[:, :14], further=DecoderTexts(wrong=wrong))
    objective = Objective(from_tree(ObjectiveConfig, {"contrastive": {"weight": 0.0}, **TERMS}), embed_dim=32)
    term = objective.config.regularisers[1]
    value = term(Pairs(**found._asdict()), ALONE)
    losses = []
    for image, text, belongs in ((0, 0, 1), (1, 1, 1), (2, 2, 1), (0, 1, 0), (0, 2, 0), (2, 0, 0)):
        length = int((tokens[text] != 0).nonzero().max()) + 1
        one = tokens[text : text + 1, :length]
        _, image_tokens = model.see(images[image : image + 1])
        _, words = model.read(one)
        hidden = model.text_decoder.hidden(image_tokens, words)  # type: ignore[union-attr,operator]
        logit = model.match_head.linear(hidden[:, -1])[0, 0]  # type: ignore[union-attr,operator]
        losses.append(F.binary_cross_entropy_with_logits(logit, torch.tensor(float(belongs), dtype=torch.double)))
    torch.testing.assert_close(value, torch.stack(losses).mean().to(value.dtype))


def test_the_head_sees_picture_and_words() -> None:
    model = matcher()
    images, tokens = rows(model)
    first = model(images, tokens, further=DecoderTexts(wrong=WrongPairs(torch.tensor([0]), tokens[:1]))).match_right
    for others in ((images[[1, 0, 2]], tokens), (images, tokens[[1, 0, 2]])):
        second = model(*others, further=DecoderTexts(wrong=WrongPairs(torch.tensor([0]), tokens[:1]))).match_right
        changed = (first - second).abs() > 1e-6
        assert changed.tolist() == [True, True, False]


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(4):
        samples = [make.tiny_sample(f"s{number}{i}", caption=f"fox {'!' * (i % 3)} {i % 6}") for i in range(8)]
        make.write_shard(tmp_path / "shards" / f"{number:06d}.tar", samples)
    return tmp_path / "shards"


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    keys = {
        "total_samples": 64,
        "model": MATCHER,
        "objective": TERMS,
        "checkpoint": {"every_samples": 32, "keep_last": 10},
        "optim": {"peak_lr": 3e-3, "schedule": {"warmup_samples": 16}},
    }
    return make.tiny_recipe(shards, run, **(keys | changes))


def column(run: Path, name: str = "total") -> list[float]:
    return [row[f"train/loss/{name}"] for row in read_metrics(run / "metrics.jsonl")]


def test_resumed_equals_unbroken_and_goes_on_elsewhere(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "whole"))
    loop.train(recipe(shards, tmp_path / "parts"))
    make.forget_after(tmp_path / "parts", 4)
    done = loop.train(recipe(shards, tmp_path / "parts"))
    assert column(tmp_path / "whole") == column(tmp_path / "parts")
    head = open_run(done).match_head.state_dict()  # type: ignore[union-attr]
    towers = {"towers": {"type": "run", "run": str(done.root)}, "matching": True}
    again = dual_encoder.build(from_tree(ModelConfig, towers), seed=1).match_head.state_dict()  # type: ignore[union-attr]
    assert all(value.equal(again[name]) for name, value in head.items())


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_train_the_same(size: int, shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "whole"))
    loop.train(recipe(shards, tmp_path / "parts", micro_batch=size))
    for name in ("total", "matching"):
        torch.testing.assert_close(
            column(tmp_path / "parts", name), column(tmp_path / "whole", name), atol=1e-4, rtol=1e-4
        )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("configuration", "size", "options"),
    [
        ("cpu", 2, ()),
        pytest.param("cpu_fsdp2", None, (), marks=pytest.mark.slow),
        pytest.param(
            "cpu_zero", 2, ("--deepspeed_config_file", "configs/deepspeed/zero3.json"), marks=pytest.mark.slow
        ),
    ],
    ids=["ddp-parts", "fsdp2", "zero3-parts"],
)
def test_two_processes_train_like_one(
    configuration: str,
    size: int | None,
    options: tuple[str, ...],
    shards: Path,
    tmp_path: Path,
    launch: Callable[..., None],
) -> None:
    loop.train(recipe(shards, tmp_path / "one"))
    (tmp_path / "two.yaml").write_text(dump(recipe(shards, tmp_path / "two", micro_batch=size)))
    launch(tmp_path / "two.yaml", configuration, *options)
    for name in ("total", "matching"):
        torch.testing.assert_close(column(tmp_path / "two", name), column(tmp_path / "one", name), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_head_learns_once_the_towers_have(tmp_path: Path) -> None:
    """Knowing nothing gives 0.6365, one pair of three being right."""
    for number in range(4):
        samples = [make.tiny_sample(f"s{number}{i}", caption=f"number {4 * i + number} fox") for i in range(8)]
        make.write_shard(tmp_path / "shards" / f"{number:06d}.tar", samples)
    keys = {"total_samples": 9600, "global_batch": 32, "optim": {"peak_lr": 3e-3}}
    loop.train(recipe(tmp_path / "shards", tmp_path / "run", **keys))
    found = column(tmp_path / "run", "matching")
    assert found[0] > 0.6
    assert max(found[-10:]) < 0.2


def test_without_weight_it_is_coca(shards: Path, tmp_path: Path) -> None:
    none = {"regularisers": [{"type": "caption"}, {"type": "matching", "weight": 0.0}]}
    loop.train(recipe(shards, tmp_path / "with", objective=none))
    plain = {"model": TINY_CAPTIONER, "objective": {"regularisers": [{"type": "caption"}]}}
    loop.train(recipe(shards, tmp_path / "without", **plain))
    for name in ("total", "caption"):
        torch.testing.assert_close(
            column(tmp_path / "with", name), column(tmp_path / "without", name), atol=1e-5, rtol=1e-5
        )


def test_head_and_term_go_together(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set both, or neither"):
        loop.train(recipe(shards, tmp_path / "run", model=TINY_CAPTIONER))
    with pytest.raises(ConfigError, match="set both, or neither"):
        loop.train(recipe(shards, tmp_path / "run", objective={"regularisers": [{"type": "caption"}]}))
    with pytest.raises(ConfigError, match="name a captioner"):
        loop.train(recipe(shards, tmp_path / "run", model=make.TINY_MODEL | {"matching": True}))
    alone = {"regularisers": [{"type": "matching"}]}
    with pytest.raises(ConfigError, match=r"frozen: \[text_decoder.text_projection\]"):
        loop.train(recipe(shards, tmp_path / "run", objective=alone))
    loop.train(
        recipe(shards, tmp_path / "run", objective=alone, model=MATCHER | {"frozen": ["text_decoder.text_projection"]})
    )
