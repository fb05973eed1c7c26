"""What is learned from another model, of another width and with another scale: dense float64 twins, one process and
several."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.losses import tiles
from diptych.losses.batch import Moment, Pairs
from diptych.losses.objective import Objective, ObjectiveConfig
from diptych.losses.plugs.regulariser import text_similarity
from diptych.testing import run_ranks

ROWS, WIDTH, TEACHER_WIDTH, TEACHER_SCALE = 12, 8, 11, 30.0


def unit(*shape: int, seed: int) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1)


def batch(rows: slice = slice(None), *, teacher_width: int = TEACHER_WIDTH) -> Pairs:
    """Some rows of a batch; all tensors of the model are leaves."""
    return Pairs(
        unit(ROWS, WIDTH, seed=1)[rows].requires_grad_(),
        unit(ROWS, WIDTH, seed=2)[rows].requires_grad_(),
        torch.tensor(9.0, dtype=torch.float64, requires_grad=True),
        known={"sample_ids": torch.arange(ROWS)[rows]},
        image_known={"teacher_features": unit(ROWS, teacher_width, seed=3)[rows]},
        text_known={"teacher_features": unit(ROWS, teacher_width, seed=4)[rows]},
        teacher_scale=TEACHER_SCALE,
    )


def objective(tree: dict[str, Any]) -> Objective:
    torch.manual_seed(0)
    return Objective(from_tree(ObjectiveConfig, tree), embed_dim=WIDTH).double()


def leaves(pairs: Pairs, loss: Objective) -> list[Tensor]:
    return [pairs.image_features, pairs.text_features, pairs.logit_scale, *loss.parameters()]


def clip(pairs: Pairs) -> Tensor:
    logits = pairs.logit_scale * pairs.image_features @ pairs.text_features.T
    return (F.cross_entropy(logits, torch.arange(ROWS)) + F.cross_entropy(logits.T, torch.arange(ROWS))) / 2


def affinities(pairs: Pairs) -> Tensor:
    """Cross-entropy of the model's rows and columns with the teacher's."""
    teacher = TEACHER_SCALE * pairs.image_known["teacher_features"] @ pairs.text_known["teacher_features"].T
    logits = pairs.logit_scale * pairs.image_features @ pairs.text_features.T
    rows = F.cross_entropy(logits, teacher.softmax(1))
    return (rows + F.cross_entropy(logits.T, teacher.T.softmax(1))) / 2


def projected(pairs: Pairs, loss: Objective, name: str) -> tuple[Tensor, Tensor]:
    """What a term sees in place of the features."""
    image, text = pairs.image_features, pairs.text_features
    if name not in loss.modules_of_terms:
        return image, text
    maps = loss.modules_of_terms[name]
    return F.normalize(image @ maps.image.weight.T, dim=1), F.normalize(text @ maps.text.weight.T, dim=1)


def feature_distance(pairs: Pairs, loss: Objective) -> Tensor:
    image, text = projected(pairs, loss, "distillation")
    sides = zip((image, text), (pairs.image_known, pairs.text_known), strict=True)
    return torch.stack([(side - known["teacher_features"]).square().sum() / ROWS for side, known in sides]).sum()


def interactive(pairs: Pairs, loss: Objective) -> Tensor:
    image, text = projected(pairs, loss, "interactive")
    sides = ((image, pairs.text_known), (text, pairs.image_known))
    logits = [pairs.logit_scale * side @ known["teacher_features"].T for side, known in sides]
    return torch.stack([F.cross_entropy(each, torch.arange(ROWS)) for each in logits]).mean()


def equal(found: Tensor, expected: Tensor, of: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    mine = torch.autograd.grad(found, of, retain_graph=True)
    theirs = torch.autograd.grad(expected, of, retain_graph=True)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-8)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROW_BLOCK", 5)
    monkeypatch.setattr(tiles, "COLUMN_BLOCK", 4)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_soft_targets_are_the_teachers_at_its_own_scale(share: float) -> None:
    loss, pairs = objective({"contrastive": {"targets": {"type": "momentum", "share": share}}}), batch()
    expected = share * affinities(pairs) + (1 - share) * clip(pairs)
    equal(loss(pairs).total, expected, leaves(pairs, loss))


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("teacher_dim", [None, TEACHER_WIDTH])
@pytest.mark.parametrize(("name", "oracle"), [("distillation", feature_distance), ("interactive", interactive)])
def test_features_come_to_the_teachers_space(name: str, oracle: Any, teacher_dim: int | None) -> None:
    loss = objective({"regularisers": [{"type": name, "weight": 0.3, "teacher_dim": teacher_dim}]})
    pairs = batch(teacher_width=teacher_dim or WIDTH)
    assert len(list(loss.parameters())) == (2 if teacher_dim else 0)
    terms = loss(pairs)
    equal(terms.total, clip(pairs) + 0.3 * oracle(pairs, loss), leaves(pairs, loss))
    assert set(terms.scalars) == {"contrastive", name, "total"}


def test_texts_are_as_alike_as_the_teacher_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_similarity, "_ROWS", 5)
    tree = {"type": "text_similarity", "weight": 0.4, "temperature": 0.3}
    loss, pairs = objective({"regularisers": [tree]}), batch()
    texts, theirs = pairs.text_features, pairs.text_known["teacher_features"]
    wanted, found = ((rows @ rows.T / 0.3).softmax(1) for rows in (theirs, texts))
    expected = clip(pairs) + 0.4 * (wanted * (wanted / found).log()).sum(1).mean()
    equal(loss(pairs).total, expected, leaves(pairs, loss))
    like = replace(pairs, text_known={"teacher_features": texts.detach()})
    assert loss(like).scalars["text_similarity"].abs() < 1e-12
    with pytest.raises(ConfigError, match="temperature must be above 0, not 0"):
        objective({"regularisers": [tree | {"temperature": 0.0}]})


def test_interactive_is_a_queue_without_memory() -> None:
    queue = objective({"contrastive": {"candidates": [{"type": "queue", "size": 0}]}})
    term = objective({"contrastive": {"weight": 0.0}, "regularisers": ["interactive"]})
    pairs = batch(teacher_width=WIDTH)
    equal(term(pairs).total, queue(pairs).total, leaves(pairs, queue))


def test_the_teacher_is_not_taught() -> None:
    loss = objective({"contrastive": {"targets": "momentum"}, "regularisers": ["distillation", "interactive"]})
    pairs = batch(teacher_width=WIDTH)
    teacher = [known["teacher_features"].requires_grad_() for known in (pairs.image_known, pairs.text_known)]
    found = torch.autograd.grad(loss(pairs).total, teacher, allow_unused=True)
    assert not any(gradient is not None and gradient.any() for gradient in found)


def test_a_model_like_its_teacher_has_no_distance() -> None:
    loss, pairs = objective({"regularisers": ["distillation"]}), batch()
    same = Pairs(
        pairs.image_features,
        pairs.text_features,
        pairs.logit_scale,
        image_known={"teacher_features": pairs.image_features},
        text_known={"teacher_features": pairs.text_features},
    )
    assert loss(same).scalars["distillation"] == 0


def test_widths_of_the_teacher_that_plugs_ask_for() -> None:
    tree = {
        "contrastive": {"targets": "momentum", "candidates": ["queue"]},
        "regularisers": ["text_grounded", "alignment", "distillation", {"type": "interactive", "teacher_dim": 11}],
    }
    asked = {"queue": WIDTH, "text_grounded": WIDTH, "distillation": WIDTH, "interactive": 11}
    assert objective(tree).teacher_widths == asked
    assert objective({"contrastive": {"targets": "momentum"}}).teacher_widths == {}


@pytest.mark.parametrize("name", ["distillation", "interactive"])
def test_nothing_is_projected_to_no_width(name: str) -> None:
    with pytest.raises(ConfigError, match="teacher_dim must be positive, not 0"):
        objective({"regularisers": [{"type": name, "teacher_dim": 0}]})


@pytest.mark.parametrize("name", ["distillation", "interactive", "text_similarity"])
def test_a_teacher_that_is_missing_is_missed(name: str) -> None:
    pairs = batch()
    with pytest.raises(ConfigError, match="name a teacher"):
        objective({"regularisers": [name]})(Pairs(pairs.image_features, pairs.text_features, pairs.logit_scale))


ALL: dict[str, Any] = {
    "contrastive": {"targets": {"type": "momentum", "share": 0.7}},
    "regularisers": [
        *({"type": name, "teacher_dim": TEACHER_WIDTH} for name in ("distillation", "interactive")),
        {"type": "text_similarity", "temperature": 0.2},
    ],
}


def on_rank(rank: int, world: int, gather: dict[str, Any]) -> tuple[Tensor, ...]:
    tiles.ROW_BLOCK, tiles.COLUMN_BLOCK = 5, 4
    loss = objective(ALL | {"contrastive": ALL["contrastive"] | {"gather": gather}})
    pairs = batch(slice(rank * ROWS // world, (rank + 1) * ROWS // world))
    total = loss(pairs, Moment()).total
    return total.detach(), *torch.autograd.grad(total, leaves(pairs, loss))


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("form", ["one_sided", "two_sided"])
def test_ranks_equal_one_process(world: int, form: str) -> None:
    ranks, alone = run_ranks(on_rank, world, world, {"form": form}), on_rank(0, 1, {"form": form})
    torch.testing.assert_close(sum(found[0] for found in ranks) / world, alone[0], atol=1e-12, rtol=1e-12)
    for place, right in enumerate(alone[1:], start=1):
        parts = [found[place] for found in ranks]
        together = torch.cat(parts) if place < 3 else torch.stack(parts).sum(0)
        torch.testing.assert_close(together / world, right, atol=1e-12, rtol=1e-9)
