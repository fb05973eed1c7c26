"""Values and gradients against a float64 oracle written from the formulas, and against open_clip."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.config import from_tree
from diptych.distributed.runtime import Ranks
from diptych.errors import ConfigError
from diptych.losses.contrastive import clip_loss, positives, siglip_loss
from diptych.losses.objective import ObjectiveConfig, Pairs, evaluate
from diptych.testing import run_ranks


def features(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype).requires_grad_()


def oracle(image: Tensor, text: Tensor, scale: Tensor, ids: list[int], smoothing: float = 0.0) -> Tensor:
    """The definition as loops over anchors and candidates."""
    size = len(ids)
    total = torch.zeros((), dtype=image.dtype)
    for anchors, candidates in ((image, text), (text, image)):
        for i in range(size):
            logits = scale * (candidates @ anchors[i])
            right = [float(ids[j] == ids[i]) for j in range(size)]
            target = torch.tensor([(1 - smoothing) * r / sum(right) + smoothing / size for r in right]).to(logits)
            total = total - (target * (logits - logits.logsumexp(0))).sum()
    return total / (2 * size)


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 8),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_clip_loss_is_the_oracles(rows: int, width: int, scale: float, smoothing: float, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    image, text = features(rows, width, 0), features(rows, width, 1)
    s = torch.tensor(scale, requires_grad=True)
    loss = clip_loss(image, text, s, caption_ids=torch.tensor(ids), label_smoothing=smoothing)
    exact = [tensor.detach().double().requires_grad_() for tensor in (image, text, s)]
    expected = oracle(*exact, ids, smoothing)
    gradients = torch.autograd.grad(loss, (image, text, s))
    # float32 logits up to 100 carry an error of 100 * 2^-24 each
    torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=1e-5)
    for found, right in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(found.double(), right, atol=2e-4, rtol=1e-4)


def test_without_ids_it_is_open_clips() -> None:
    image, text, scale = features(7, 5, 0), features(7, 5, 1), torch.tensor(14.0)
    theirs = open_clip.loss.ClipLoss()(image, text, scale)
    torch.testing.assert_close(clip_loss(image, text, scale), theirs, atol=1e-6, rtol=1e-6)


def test_siglip_is_open_clips() -> None:
    image, text = features(7, 5, 0), features(7, 5, 1)
    scale, bias = torch.tensor(10.0), torch.tensor(-8.0)
    theirs = open_clip.loss.SigLipLoss()(image, text, scale, bias)
    ours = siglip_loss(image, text, scale, bias, torch.eye(7, dtype=torch.bool))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_different_ids_change_nothing_and_own_partner_is_always_right() -> None:
    image, text = features(5, 4, 0), features(5, 4, 1)
    torch.testing.assert_close(clip_loss(image, text, 9.0, caption_ids=torch.arange(5)), clip_loss(image, text, 9.0))
    assert positives(torch.tensor([1]), torch.tensor([3]), torch.tensor([0, 0])).tolist() == [[False, True]]


def test_one_pair_has_no_loss() -> None:
    assert clip_loss(features(1, 4, 0), features(1, 4, 1), 100.0).item() == 0.0


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        clip_loss(features(3, 4, 0), features(2, 4, 1), 1.0)


def test_impossible_combinations_are_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing belongs to the softmax"):
        from_tree(ObjectiveConfig, {"contrastive": {"normaliser": "sigmoid", "label_smoothing": 0.1}})


OBJECTIVES = [
    {"contrastive": {}},
    {"contrastive": {"targets": "same_caption", "label_smoothing": 0.1, "weight": 2.0}},
    {"contrastive": {"normaliser": "sigmoid", "targets": "same_caption"}},
    {"contrastive": {"normaliser": "sigmoid"}},
]


def rank_gradients(rank: int, world: int, tree: dict) -> tuple[float, Tensor, Tensor, Tensor]:
    """What one rank of `world` finds for its quarter of 8 pairs."""
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    image, text = features(8, 6, 0).detach()[rows].requires_grad_(), features(8, 6, 1).detach()[rows].requires_grad_()
    scale = torch.tensor(5.0, requires_grad=True)
    ids = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5])[rows]
    pairs = Pairs(image, text, scale, torch.tensor(-3.0), ids)
    loss = evaluate(from_tree(ObjectiveConfig, tree), pairs, Ranks(rank, world)).total
    loss.backward()
    assert image.grad is not None
    assert text.grad is not None
    assert scale.grad is not None
    return loss.item(), image.grad, text.grad, scale.grad


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("tree", OBJECTIVES)
def test_ranks_equal_one_process(world: int, tree: dict) -> None:
    alone = rank_gradients(0, 1, tree)
    ranks = run_ranks(rank_gradients, world, world, tree)
    assert sum(loss for loss, *_ in ranks) / world == pytest.approx(alone[0], abs=1e-6)
    for place in (1, 2):
        # each rank differentiates the sum of all losses, of which training takes the mean
        together = torch.cat([rank[place] for rank in ranks]) / world
        torch.testing.assert_close(together, alone[place], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sum(rank[3] for rank in ranks) / world, alone[3], atol=1e-6, rtol=1e-5)
