"""Two models on the same items: how sure the difference of their means is.

Both tests look at d, the difference of the two models' values on each item, and suppose that items are independent, or
that clusters of them are, such as the captions of one picture. A cluster is drawn, or its sign turned, as a whole:

    interval    percentiles of the mean of d over items drawn with replacement
    p           share of all ways to give d other signs whose sum is at least as far from 0 as the one observed

The second is exact where the items that differ are few, or where all of them differ by the same amount (values of 0
and 1: it is then McNemar's exact test); otherwise it is estimated from draws, never below 1 / (draws + 1).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from diptych_eval.metrics import bootstrap_interval, cluster_sums

_EXACT = 16
_DRAWS = 10_000
_KINDS = 64
_BLOCK = 1 << 22
# Sums of the same terms in another order differ in the last bits; they are the same sum.
_SLACK = 1e-9


def interval(
    differences: Float[Tensor, " N"], clusters: Int[Tensor, " N"] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """95% bootstrap interval of the mean difference; `clusters` as in `metrics.bootstrap_interval`."""
    if clusters is not None:
        return bootstrap_interval(differences, clusters, seed=seed)
    values, counts = np.unique(differences.double().numpy(), return_counts=True)
    if len(values) > _KINDS:
        return bootstrap_interval(differences, seed=seed)
    total = int(counts.sum())  # how often each value is drawn is multinomial: no item is touched twice
    means = np.random.default_rng(seed).multinomial(total, counts / total, size=2000) @ values / total
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def p_value(differences: Float[Tensor, " N"], clusters: Int[Tensor, " N"] | None = None, *, seed: int = 0) -> float:
    """Of the two-sided sign-flip test; 1 where nothing differs."""
    if clusters is not None:
        return p_value(cluster_sums(differences[:, None], clusters)[:, 0], seed=seed)
    values = differences.double().numpy()
    sizes = np.abs(values[values != 0])
    if len(np.unique(sizes)) <= 1:
        return _binomial(int((values > 0).sum()), int((values < 0).sum()))
    observed = abs(values.sum()) - _SLACK * sizes.sum()
    if len(sizes) <= _EXACT:
        signs = (np.arange(1 << len(sizes))[:, None] >> np.arange(len(sizes)) & 1) * 2 - 1
        return float((np.abs(signs @ sizes) >= observed).mean())
    return (1 + int((np.abs(_drawn_sums(sizes, seed)) >= observed).sum())) / (1 + _DRAWS)


def _binomial(positive: int, negative: int) -> float:
    """All differences have one size: their number says everything. In whole numbers, so exact."""
    if positive == negative:
        return 1.0
    total = positive + negative
    ways = term = 1
    for chosen in range(min(positive, negative)):
        term = term * (total - chosen) // (chosen + 1)
        ways += term
    return 2 * ways / 2**total


def _drawn_sums(sizes: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kinds, counts = np.unique(sizes, return_counts=True)
    if len(kinds) <= _KINDS:
        return (2 * rng.binomial(counts, 0.5, size=(_DRAWS, len(kinds))) - counts) @ kinds
    rows = max(1, _BLOCK // len(sizes))
    sums = []
    for first in range(0, _DRAWS, rows):
        shape = (min(rows, _DRAWS - first), len(sizes))
        sums.append(rng.integers(0, 2, shape, dtype=np.int8) @ (2 * sizes) - sizes.sum())
    return np.concatenate(sums)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same, so corrected that the chance of any false alarm among all of them stays below the level.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
