from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych_eval import metrics, paired


def brute_force(differences: list[float]) -> float:
    """All signs of all differences, zeros included."""
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    return sum(one >= abs(sum(differences)) - 1e-9 for one in sums) / len(sums)


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=10))
@settings(max_examples=60, deadline=None)
def test_p_of_zeros_and_ones_is_all_signs(differences: list[float]) -> None:
    assert paired.p_value(torch.tensor(differences)) == pytest.approx(brute_force(differences))


@given(st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_p_of_few_items_is_all_signs(differences: list[float]) -> None:
    values = torch.tensor(differences, dtype=torch.float64)
    assert paired.p_value(values) == pytest.approx(brute_force(values.tolist()))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_sums_that_differ_in_their_last_bits_only_are_equal(tenths: list[int]) -> None:
    values = torch.tensor(tenths, dtype=torch.float64)
    assert paired.p_value(0.1 * values) == paired.p_value(values)


def test_p_by_hand() -> None:
    assert paired.p_value(torch.zeros(7)) == 1.0
    assert paired.p_value(torch.ones(10)) == 2 / 1024
    # McNemar: 12 items changed for the better, 3 for the worse, 1000 did not change
    changed = torch.tensor([1.0] * 12 + [-1.0] * 3 + [0.0] * 1000)
    assert paired.p_value(changed) == pytest.approx(2 * sum(comb(15, k) for k in range(4)) / 2**15)
    assert paired.p_value(-changed) == paired.p_value(changed)


@pytest.mark.parametrize("kinds", [64, 0])
def test_drawn_signs_come_near_all_signs(monkeypatch: pytest.MonkeyPatch, kinds: int) -> None:
    values = torch.tensor([1, 2, 3, -1, 2, 3, 1, -2, 3, 1, 2, -3, 1, 1]).double()
    exact = paired.p_value(values)
    assert 0.02 < exact < 0.5
    monkeypatch.setattr(paired, "_EXACT", 0)
    monkeypatch.setattr(paired, "_KINDS", kinds)
    monkeypatch.setattr(paired, "_BLOCK", 1000)  # several blocks
    drawn = paired.p_value(values)
    assert drawn == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 10_000) ** 0.5)  # four standard errors
    assert paired.p_value(values) == drawn


def test_models_that_do_not_differ_are_seldom_called_different() -> None:
    rng = np.random.default_rng(0)
    alarms = sum(
        paired.p_value(torch.from_numpy((rng.random(80) < 0.4).astype(float) - (rng.random(80) < 0.4))) < 0.05
        for _ in range(400)
    )
    assert alarms / 400 < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5  # the level, and three standard errors


def test_the_interval_is_that_of_items_drawn_one_by_one() -> None:
    differences = torch.tensor([1.0] * 30 + [-1.0] * 10 + [0.0] * 160)
    low, high = paired.interval(differences)
    one_by_one = metrics.bootstrap_interval(differences, samples=4000)
    # quantiles of a few thousand draws: their own error is a few percent of the width
    assert (low, high) == pytest.approx(one_by_one, abs=0.05 * (high - low) + 1 / 200)
    assert low < 0.1 < high
    assert paired.interval(differences) == (low, high)
    assert paired.interval(torch.zeros(5)) == (0.0, 0.0)
    continuous = torch.linspace(-1, 2, 300).double()
    assert paired.interval(continuous) == metrics.bootstrap_interval(continuous)


def test_clusters_change_signs_together() -> None:
    differences = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0, 1.0])
    clusters = torch.tensor([0, 0, 1, 1, 2, 2])
    # sums 2, 0 and 1: of the eight ways, |sum| is at least 3 where the first and the last agree
    assert paired.p_value(differences, clusters) == 4 / 8
    assert paired.p_value(differences, torch.arange(6)) == paired.p_value(differences)
    assert paired.interval(torch.zeros(6), clusters) == (0.0, 0.0)


def test_models_that_do_not_differ_are_seldom_called_different_by_clusters() -> None:
    """Five captions of a picture go right or wrong together: taken for independent they raise false alarms."""
    rng = np.random.default_rng(0)
    clusters = torch.arange(30).repeat_interleave(5)
    alarms = np.zeros(2)
    for _ in range(300):
        drawn = torch.from_numpy(rng.integers(-1, 2, 30).astype(float)).repeat_interleave(5)
        alarms += [paired.p_value(drawn, some) < 0.05 for some in (clusters, None)]
    assert alarms[0] / 300 < 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5  # the level, and three standard errors
    assert alarms[1] / 300 > 0.2


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.5, 0.6]) == [1.0, 1.0]
    assert paired.holm([]) == []
