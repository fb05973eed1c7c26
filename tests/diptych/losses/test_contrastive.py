"""CLIP's and SigLIP's own losses, in tiles: against dense float64, against open_clip, and on bad input."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.losses import tiles
from diptych.losses.contrastive import contrastive_loss
from diptych.losses.objective import ObjectiveConfig
from diptych.losses.statistics import logsumexp_of_pairs, softplus_of_pairs


def features(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype).requires_grad_()


def clip_oracle(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The definition as loops over anchors."""
    losses = []
    for anchors, candidates in ((image, text), (text, image)):
        for i in range(len(image)):
            logits = scale * (candidates @ anchors[i])
            losses.append(logits.logsumexp(0) - logits[i])
    return torch.stack(losses).mean()


def siglip_oracle(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    losses = []
    for i in range(len(image)):
        for j in range(len(text)):
            sign = 1 if i == j else -1
            losses.append(-F.logsigmoid(sign * (scale * (image[i] @ text[j]) + bias)))
    return torch.stack(losses).sum() / len(image)


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


TILES = st.tuples(st.integers(1, 5), st.integers(1, 6))


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 8),
    scale=st.sampled_from([1e-3, 1.0, 14.3, 100.0, 1000.0]),
    sigmoid=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    repeated=st.booleans(),
    sizes=TILES,
)
@settings(max_examples=120, deadline=None)
def test_tiles_are_the_oracle(
    rows: int, width: int, scale: float, sigmoid: bool, dtype: torch.dtype, repeated: bool, sizes: tuple[int, int]
) -> None:
    image, text = features(rows, width, 0, dtype), features(rows, width, 1, dtype)
    if repeated:
        image = image.detach()[torch.arange(rows) // 2].requires_grad_()
        text = text.detach()[torch.arange(rows) // 2].requires_grad_()
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (scale, -3.0)]
    if dtype != torch.float64:
        numbers = [number.float() for number in numbers]
    s, b = (number.requires_grad_() for number in numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROW_BLOCK", sizes[0])
        patch.setattr(tiles, "COLUMN_BLOCK", sizes[1])
        options = {"logit_bias": b, "normaliser": "sigmoid"} if sigmoid else {}
        loss = contrastive_loss(image, text, s, **options)
        inputs = [image, text, s, b] if sigmoid else [image, text, s]
        found = gradients(loss, inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = siglip_oracle(*exact) if sigmoid else clip_oracle(*exact)
    single = torch.float32 if dtype != torch.float64 else torch.float64
    assert loss.dtype == single
    # A logit carries scale · D roundings of its products; a probability the same, relatively.
    error = 8 * torch.finfo(single).eps * (scale + 4)
    torch.testing.assert_close(loss.double(), expected, atol=error * (rows if sigmoid else 1), rtol=error)
    for mine, right in zip(found, gradients(expected, exact), strict=True):
        rounding = torch.finfo(mine.dtype).eps  # gradients are returned in the features' own type
        tolerance = (error + rounding) * max(scale, 1.0)
        torch.testing.assert_close(mine.double(), right, atol=tolerance, rtol=2 * rounding + error)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1.0, 50.0, 500.0]), TILES)
@settings(max_examples=60, deadline=None)
def test_statistics_of_rectangles(rows: int, columns: int, scale: float, sizes: tuple[int, int]) -> None:
    """Any two sides, and gradients of any sign and size for every row and column."""
    left, right = features(rows, 7, 2, torch.float64), features(columns, 7, 3, torch.float64)
    s, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (scale, 0.5))
    row_grad = torch.linspace(-1, 2, rows, dtype=torch.float64)
    column_grad = torch.linspace(3, -1, columns, dtype=torch.float64)
    own_grad = torch.linspace(2, -3, rows, dtype=torch.float64)
    partner = torch.arange(rows) % (columns + 1) - 1  # some have none, some share one
    dense = s * left @ right.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROW_BLOCK", sizes[0])
        patch.setattr(tiles, "COLUMN_BLOCK", sizes[1])
        row_lse, column_lse, own = logsumexp_of_pairs(left, right, s, partner)
        sums, own_too = softplus_of_pairs(left, right, s, b, partner)
        total = (row_lse * row_grad).sum() + (column_lse * column_grad).sum() + (own * own_grad).sum()
        found = gradients(total, [left, right, s])
        found += gradients((sums * row_grad).sum() + (own_too * own_grad).sum(), [left, right, s, b])
    torch.testing.assert_close(row_lse, dense.logsumexp(1))
    torch.testing.assert_close(column_lse, dense.logsumexp(0))
    torch.testing.assert_close(sums, -F.logsigmoid(-dense - b).sum(1))
    mine = torch.where(partner < 0, 0.0, dense.gather(1, partner.clamp(min=0)[:, None])[:, 0])
    mine_too = torch.where(partner < 0, 0.0, mine + b)
    torch.testing.assert_close(own, mine)
    torch.testing.assert_close(own_too, mine_too)
    expected = (
        (dense.logsumexp(1) * row_grad).sum() + (dense.logsumexp(0) * column_grad).sum() + (mine * own_grad).sum()
    )
    exact = torch.autograd.grad(expected, [left, right, s], retain_graph=True)
    expected = (-F.logsigmoid(-dense - b).sum(1) * row_grad).sum() + (mine_too * own_grad).sum()
    exact += torch.autograd.grad(expected, [left, right, s, b])
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-8)


def test_rows_far_below_the_tiles_maximum_keep_their_digits() -> None:
    """At a scale of 400 one exponential cannot serve all; every row and column still has its exact sum in float32."""
    image = F.normalize(torch.tensor([[1.0, 0, 0], [-1, 0.01, 0], [0, 0, 1], [-1, 0, 0.01]]), dim=1)
    text = F.normalize(torch.tensor([[1.0, 0.1, 0], [0.9, 0, 0.1], [0.8, 0, 0]]), dim=1)
    rows, columns, _ = logsumexp_of_pairs(image, text, torch.tensor(400.0), torch.full((4,), -1))
    dense = 400 * image.double() @ text.double().T
    torch.testing.assert_close(rows.double(), dense.logsumexp(1), atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(columns.double(), dense.logsumexp(0), atol=1e-4, rtol=1e-6)
    assert rows.min() < -350
    assert rows.max() > 350


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_it_is_open_clips(scale: float) -> None:
    image, text = features(70, 16, 0), features(70, 16, 1)
    s, b = torch.tensor(scale, requires_grad=True), torch.tensor(-8.0, requires_grad=True)
    pairs = [
        (contrastive_loss(image, text, s), open_clip.loss.ClipLoss()(image, text, s), [image, text, s]),
        (
            contrastive_loss(image, text, s, logit_bias=b, normaliser="sigmoid"),
            open_clip.loss.SigLipLoss()(image, text, s, b),
            [image, text, s, b],
        ),
    ]
    for ours, theirs, inputs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        for mine, right in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
            torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"normaliser": "sigmoid"}])
def test_what_a_learned_pair_still_teaches_is_not_rounded_away(options: dict) -> None:
    """Where numerator and denominator cancel to some 1e-4, bfloat16 features still get gradients good to 2^-8."""
    image = features(32, 64, 0, torch.bfloat16)
    text = image.detach().clone().requires_grad_()
    s, b = torch.tensor(18.0 if options else 12.0), torch.tensor(-9.0)
    given = options | ({"logit_bias": b} if options else {})
    found = gradients(contrastive_loss(image, text, s, **given), [image])[0].double()
    exact = [tensor.detach().double().requires_grad_() for tensor in (image, text)]
    oracle = siglip_oracle(*exact, s, b) if options else clip_oracle(*exact, s)
    expected = torch.autograd.grad(oracle, exact)[0]
    assert (found - expected).norm() < 2**-8 * expected.norm()


def test_autocast_does_not_touch_it() -> None:
    image, text = features(9, 8, 0), features(9, 8, 1)
    plain = contrastive_loss(image, text, 50.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, 50.0), plain)
        composed = contrastive_loss(image, text, 50.0, weights=["decoupled"])
    assert torch.equal(contrastive_loss(image, text, 50.0, weights=["decoupled"]), composed)


def test_no_gradient_is_asked_for() -> None:
    image, text = features(5, 4, 0), features(5, 4, 1).detach()
    assert torch.autograd.grad(contrastive_loss(image, text, 10.0), image)[0].isfinite().all()
    with torch.no_grad():
        assert not contrastive_loss(image, text, 10.0).requires_grad


@pytest.mark.parametrize(
    "options", [{}, {"normaliser": "sigmoid"}, {"weights": ["decoupled"]}, {"label_smoothing": 0.1}]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_never_a_finite_loss(options: dict, bad: float) -> None:
    image, text = features(6, 4, 0).detach(), features(6, 4, 1)
    image[2, 1] = bad
    loss = contrastive_loss(image.requires_grad_(), text, 10.0, **options)
    assert not loss.isfinite()


@pytest.mark.parametrize("options", [{}, {"normaliser": "sigmoid"}, {"weights": ["repulsion"]}, {"targets": "cwcl"}])
def test_zero_vectors_have_finite_losses_and_gradients(options: dict) -> None:
    image, text = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    s = torch.tensor(100.0, requires_grad=True)
    loss = contrastive_loss(image, text, s, **options)
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, [image, text, s]):
        assert gradient.isfinite().all()


def test_one_pair_has_loss_zero() -> None:
    image, text = features(1, 4, 0), features(1, 4, 1)
    loss = contrastive_loss(image, text, 10.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, image)[0].abs().max() < 1e-5


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one text per picture"):
        contrastive_loss(torch.ones(3, 4), torch.ones(2, 4), 1.0)
    with pytest.raises(ValueError, match="one text per picture"):
        contrastive_loss(torch.ones(0, 4), torch.ones(0, 4), 1.0)
    with pytest.raises(ValueError, match="caption_ids"):
        contrastive_loss(torch.ones(3, 4), torch.ones(3, 4), 1.0, known={"caption_ids": torch.arange(2)})


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="label_smoothing must lie"):
        from_tree(ObjectiveConfig, {"contrastive": {"label_smoothing": 1.0}})
    with pytest.raises(ConfigError, match="softmax"):
        from_tree(ObjectiveConfig, {"contrastive": {"normaliser": "sigmoid", "label_smoothing": 0.1}})
    with pytest.raises(ConfigError, match="did you mean 'normaliser'"):
        contrastive_loss(torch.ones(2, 4), torch.ones(2, 4), 1.0, normalizer="softmax")
