"""The metrics, as pure functions of features. Nothing larger than one block of similarities is ever held.

Rank of an anchor = 1 + the number of wrong candidates that score at least as high as its best right candidate. So ties
count against the model: features that are all equal give the worst rank, not the best, and the order of candidates
never matters. Recall@k (and top-k accuracy, where the candidates are classes) is the share of anchors with rank ≤ k.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 1024


def ranks(
    anchors: Float[Tensor, "N D"], candidates: Float[Tensor, "M D"], right: Sequence[Sequence[int]]
) -> Int[Tensor, " N"]:
    """Rank of each anchor's best right candidate.

    Args:
        right: for each anchor, the positions of its right candidates (one or more, without repeats).

    Raises:
        ValueError: an anchor has no right candidate, or the numbers do not match.
    """
    if len(right) != len(anchors):
        raise ValueError(f"{len(anchors)} anchors but right candidates for {len(right)}")
    if any(not positions for positions in right):
        raise ValueError("every anchor needs at least one right candidate")
    found = []
    for start in range(0, len(anchors), _BLOCK):
        scores = anchors[start : start + _BLOCK] @ candidates.T
        block = right[start : start + _BLOCK]
        rows = torch.tensor([row for row, positions in enumerate(block) for _ in positions])
        columns = torch.tensor([column for positions in block for column in positions])
        right_scores = torch.full_like(scores, -torch.inf)
        right_scores[rows, columns] = scores[rows, columns]
        best = right_scores.max(1, keepdim=True).values
        at_least = ~(scores < best)  # so written, NaN counts against the model too
        at_least[rows, columns] = False
        found.append(1 + at_least.sum(1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def recall_at(ranks: Int[Tensor, " N"], k: int) -> float:
    """Share of anchors with rank at most k; NaN when there are none."""
    return float((ranks <= k).double().mean())


def median_rank(ranks: Int[Tensor, " N"]) -> float:
    """The middle rank (mean of the two middle ones for an even number)."""
    return float(np.median(ranks.numpy()))


def mean_per_class(correct: Float[Tensor, " N"], labels: Int[Tensor, " N"]) -> float:
    """Mean over the classes that occur of the mean over their items."""
    classes, positions = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, positions, correct.double())
    counts = torch.bincount(positions, minlength=len(classes))
    return float((sums / counts).mean())


def bootstrap_interval(
    values: Float[Tensor, " N"], *, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over items drawn with replacement.

    For values of 0 and 1 the number of ones in a draw is binomial, so no item is touched twice.
    """
    rng = np.random.default_rng(seed)
    items = values.double().numpy()
    if np.isin(items, (0.0, 1.0)).all():
        means = rng.binomial(len(items), items.mean(), size=samples) / len(items)
    else:
        means = np.array([items[rng.integers(0, len(items), len(items))].mean() for _ in range(samples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
