import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych_eval import metrics


def brute_force(scores: np.ndarray, right: list[list[int]]) -> list[int]:
    ranks = []
    for row, positions in zip(scores, right, strict=True):
        best = max(row[j] for j in positions)
        ranks.append(1 + sum(row[j] >= best for j in range(len(row)) if j not in positions))
    return ranks


@given(st.integers(1, 12), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_ranks_are_brute_forces_ties_included(anchors: int, candidates: int, data: st.DataObject) -> None:
    # few distinct whole numbers: products are exact and ties are common
    grid = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    a = np.array(data.draw(st.lists(grid, min_size=anchors, max_size=anchors)), dtype=np.float64)
    b = np.array(data.draw(st.lists(grid, min_size=candidates, max_size=candidates)), dtype=np.float64)
    chosen = st.lists(st.integers(0, candidates - 1), min_size=1, max_size=3, unique=True)
    right = data.draw(st.lists(chosen, min_size=anchors, max_size=anchors))
    found = metrics.ranks(torch.tensor(a).float(), torch.tensor(b).float(), right)
    assert found.tolist() == brute_force(a @ b.T, right)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 4, generator=generator), torch.randn(30, 4, generator=generator)
    right = [[i % 30, (7 * i) % 30] if i % 30 != (7 * i) % 30 else [i % 30] for i in range(50)]
    whole = metrics.ranks(a, b, right)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    monkeypatch.setattr(metrics, "_COLUMNS", 4)
    assert metrics.ranks(a, b, right).equal(whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ranks_of_half_features_are_those_of_the_same_halves(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """In float64: products of two halves are exact in float32, and scores of so few are further apart than sums err."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(300, 8, generator=generator)).to(dtype) for _ in range(2))
    b[7] = b[3]  # a tie
    right = [[row] for row in range(300)]
    monkeypatch.setattr(metrics, "_ROWS", 64)
    monkeypatch.setattr(metrics, "_COLUMNS", 90)
    of_images, of_texts = metrics.ranks_both_ways(a, b, right)
    scores = (a.double() @ b.double().T).numpy()
    assert of_images.tolist() == brute_force(scores, right)
    assert of_texts.tolist() == brute_force(scores.T, right)
    cut = (a @ b.T).double().numpy()
    assert brute_force(cut, right) != of_images.tolist()  # what sums in half precision would give


@given(st.integers(2, 12), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_both_ways_are_each_way(images: int, texts: int, data: st.DataObject) -> None:
    grid = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    a = torch.tensor(data.draw(st.lists(grid, min_size=images, max_size=images))).float()
    b = torch.tensor(data.draw(st.lists(grid, min_size=texts, max_size=texts))).float()
    right = [sorted({i % texts, *data.draw(st.sets(st.integers(0, texts - 1), max_size=2))}) for i in range(images)]
    owners = [[i for i in range(images) if text in right[i]] for text in range(texts)]
    if not all(owners):
        with pytest.raises(ValueError, match="every candidate"):
            metrics.ranks_both_ways(a, b, right)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_ROWS", 5)
        patch.setattr(metrics, "_COLUMNS", 3)
        of_images, of_texts = metrics.ranks_both_ways(a, b, right)
    assert of_images.tolist() == brute_force((a @ b.T).numpy(), right)
    assert of_texts.tolist() == brute_force((b @ a.T).numpy(), owners)


def test_average_precision_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.5], [0.1, 0.5]])
    truth = torch.tensor([[True, True], [False, False], [True, False]])
    first, tied = metrics.average_precision(scores, truth).tolist()
    assert first == pytest.approx((1 + 2 / 3) / 2)
    assert tied == pytest.approx(1 / 3)  # all scores are equal: the right one comes last
    assert metrics.average_precision(scores, torch.zeros(3, 2, dtype=torch.bool)).isnan().all()


def test_calibration_by_hand() -> None:
    found = metrics.calibration(torch.tensor([0.95, 0.85, 0.15, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]), bins=2)
    assert found.counts == (1, 3)
    assert found.accuracy == pytest.approx((0, 2 / 3))
    assert found.error == pytest.approx((0.15 + 3 * abs(2 / 3 - 2.8 / 3)) / 4)


def test_a_model_that_says_nothing_gets_nothing() -> None:
    same = torch.ones(4, 3)
    ranks = metrics.ranks(same, same, [[i] for i in range(4)])
    assert ranks.tolist() == [4, 4, 4, 4]
    assert metrics.recall_at(ranks, 1) == 0.0


def test_toy_case_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.8, 0.9], [0.1, 0.2, 0.3]])
    ranks = metrics.ranks(scores, torch.eye(3), [[0], [1], [2]])
    assert ranks.tolist() == [1, 2, 1]
    assert metrics.recall_at(ranks, 1) == pytest.approx(2 / 3)
    assert metrics.recall_at(ranks, 2) == 1.0
    assert metrics.median_rank(ranks) == 1.0


def test_mean_per_class_weighs_classes_not_items() -> None:
    correct = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert metrics.mean_per_class(correct, torch.tensor([5, 5, 5, 9])) == 0.5


@pytest.mark.parametrize("right", [[[0]], [[0], []]])
def test_an_anchor_without_right_candidate_is_an_error(right: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="right candidate"):
        metrics.ranks(torch.ones(2, 2), torch.ones(2, 2), right)


def test_intervals_hold_the_mean_and_shrink_with_more_items() -> None:
    small, large = torch.tensor([0.0, 1.0] * 20), torch.tensor([0.0, 1.0] * 2000)
    low, high = metrics.bootstrap_interval(small)
    assert low < 0.5 < high
    # normal approximation: 1.96 * sqrt(0.25 / 40)
    assert (high - low) / 2 == pytest.approx(0.155, abs=0.03)
    narrow = metrics.bootstrap_interval(large)
    assert narrow[1] - narrow[0] < (high - low) / 5
    assert metrics.bootstrap_interval(small) == (low, high)
    low, high = metrics.bootstrap_interval(torch.tensor([0.0, 0.25, 0.5, 1.0] * 10))
    assert low < 0.4375 < high


def test_rows_of_a_cluster_are_drawn_together() -> None:
    values = torch.tensor([0.0, 1.0] * 100)
    alone = metrics.bootstrap_interval(values.repeat_interleave(5))
    low, high = metrics.bootstrap_interval(values.repeat_interleave(5), torch.arange(200).repeat_interleave(5))
    # the same 200 answers five times over say no more than once: 1.96 * sqrt(0.25 / 200), its quantiles drawn
    assert (high - low) / 2 == pytest.approx(0.069, abs=0.007)
    assert alone[1] - alone[0] < 0.6 * (high - low)
    assert metrics.cluster_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 0, 1])).tolist() == [[2.0], [5.0]]
    # clusters of other sizes: the mean is over rows, so whatever is drawn it lies between the clusters' own
    low, high = metrics.bootstrap_interval(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 0, 1]))
    assert (low, high) == (0.0, 1.0)


def test_a_model_that_broke_down_is_not_perfect() -> None:
    broken = torch.full((3, 2), torch.nan)
    assert metrics.ranks(broken, broken, [(0,), (1,), (2,)]).tolist() == [3, 3, 3]
