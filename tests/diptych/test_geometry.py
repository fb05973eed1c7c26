"""Each figure against its definition in float64 numpy, and where the answer is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diptych import geometry


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3, dim=-1).to(dtype)


def dense_uniformity(x: np.ndarray) -> float:
    values = [math.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    return math.log(sum(values) / len(values))


def dense_rank(x: np.ndarray) -> float:
    singular = np.linalg.svd(x, compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    return math.exp(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(("rows", "dim"), [(2, 3), (7, 16), (40, 5)])
def test_definitions(rows: int, dim: int) -> None:
    image, text = features(rows, dim), features(rows, dim, seed=1)
    a, b = image.numpy(), text.numpy()
    assert geometry.alignment(image, text).item() == pytest.approx(((a - b) ** 2).sum(1).mean(), rel=1e-12)
    assert geometry.uniformity(image).item() == pytest.approx(dense_uniformity(a), rel=1e-12)
    gap = np.linalg.norm(a.mean(0) - b.mean(0))
    assert geometry.modality_gap(image, text).item() == pytest.approx(gap, rel=1e-12)
    assert geometry.effective_rank(image).item() == pytest.approx(dense_rank(a), rel=1e-9)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_low_precision_is_summed_in_float32(dtype: torch.dtype, error: float) -> None:
    image, text = features(64, 32, dtype=dtype), features(64, 32, seed=1, dtype=dtype)
    a, b = image.double(), text.double()  # rounded as they are; the rest is the sums' own rounding
    for figure, exact in [
        (geometry.alignment(image, text), geometry.alignment(a, b)),
        (geometry.modality_gap(image, text), geometry.modality_gap(a, b)),
        (geometry.effective_rank(text), geometry.effective_rank(b)),
        # Norms of bf16 vectors are off by 2**-8, which the short form of the distance takes for part of it.
        (geometry.uniformity(image), geometry.uniformity(normalize(a, dim=-1))),
    ]:
        assert figure.dtype == torch.float32
        assert figure.item() == pytest.approx(exact.item(), abs=error)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    image = features(23, 8)
    whole = geometry.uniformity(image)
    for entries in (1, 23 * 5, 23 * 22):
        monkeypatch.setattr(geometry, "_TILE", entries)
        torch.testing.assert_close(geometry.uniformity(image), whole, rtol=1e-14, atol=0)


def test_where_the_answer_is_known() -> None:
    same = torch.ones(5, 1) * torch.tensor([[0.6, 0.8]])
    assert geometry.alignment(same, -same).item() == pytest.approx(4)
    assert geometry.modality_gap(same, -same).item() == pytest.approx(2)
    assert geometry.uniformity(same).item() == pytest.approx(0, abs=1e-6)
    assert geometry.effective_rank(same).item() == pytest.approx(1)
    axes = torch.eye(6)[[0, 1, 2, 0, 1, 2]]
    assert geometry.effective_rank(axes).item() == pytest.approx(3)
    assert geometry.effective_rank(axes.repeat(9, 1)).item() == pytest.approx(3)
    # Of 30 ordered pairs 6 coincide; the others are at a squared distance of 2.
    assert geometry.uniformity(axes).item() == pytest.approx(math.log((6 + 24 * math.exp(-4)) / 30))


def test_one_row_has_no_pairs() -> None:
    assert geometry.uniformity(features(1, 4)).isnan()
    assert geometry.effective_rank(features(1, 4)).item() == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_raise_nothing(value: float) -> None:
    image = features(6, 4)
    image[2, 1] = value
    assert geometry.effective_rank(image).isnan()
    assert not geometry.uniformity(image).isfinite()


def test_alignment_has_a_gradient() -> None:
    image, text = features(5, 3).requires_grad_(), features(5, 3, seed=1)
    geometry.alignment(image, text).backward()
    torch.testing.assert_close(image.grad, 2 * (image.detach() - text) / 5)
