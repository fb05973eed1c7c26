"""The metrics, as pure functions of features. Nothing larger than one block of similarities is ever held. Features may
be stored in half precision: each block of them is raised to float32.

Rank of an anchor = 1 + the number of wrong candidates that score at least as high as its best right candidate. So ties
count against the model: features that are all equal give the worst rank, not the best, and the order of candidates
never matters. Recall@k (and top-k accuracy, where the candidates are classes) is the share of anchors with rank ≤ k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ROWS, _COLUMNS = 512, 2048


Right = Sequence[Sequence[int]]
"""For each anchor, the positions of its right candidates: one or more, without repeats."""


@dataclass(frozen=True)
class _RightPairs:
    """Right (anchor, candidate) pairs by the block of scores in which they lie."""

    rows: Int[Tensor, " P"]
    columns: Int[Tensor, " P"]
    starts: dict[tuple[int, int], tuple[int, int]]
    """(block of anchors, block of candidates) → where its pairs stand."""

    @classmethod
    def of(cls, right: Right) -> "_RightPairs":
        rows = np.repeat(np.arange(len(right)), [len(positions) for positions in right])
        columns = np.fromiter((column for positions in right for column in positions), np.int64, len(rows))
        blocks = np.stack([rows // _ROWS, columns // _COLUMNS])
        order = np.lexsort((blocks[1], blocks[0]))
        rows, columns, blocks = rows[order], columns[order], blocks[:, order]
        edges = np.flatnonzero(np.any(np.diff(blocks, axis=1) != 0, axis=0)) + 1
        ends = np.append(edges, len(rows))
        starts = {
            (int(blocks[0, first]), int(blocks[1, first])): (int(first), int(last))
            for first, last in zip(np.insert(edges, 0, 0), ends, strict=True)
            if last > first
        }
        return cls(torch.from_numpy(rows), torch.from_numpy(columns), starts)

    def within(self, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Rows and columns of a block's pairs, counted from its corner."""
        first, last = self.starts.get(block, (0, 0))
        return self.rows[first:last] - block[0] * _ROWS, self.columns[first:last] - block[1] * _COLUMNS


def ranks(anchors: Float[Tensor, "N D"], candidates: Float[Tensor, "M D"], right: Right) -> Int[Tensor, " N"]:
    """Rank of each anchor's best right candidate.

    Raises:
        ValueError: an anchor has no right candidate, or the numbers do not match.
    """
    return _ranks(anchors, candidates, right, both=False)[0]


def ranks_both_ways(
    images: Float[Tensor, "N D"], texts: Float[Tensor, "M D"], right: Right
) -> tuple[Int[Tensor, " N"], Int[Tensor, " M"]]:
    """Rank of each image's best right text, and of each text's best right image, from one pass over all pairs.

    Raises:
        ValueError: an image or a text has nothing right, or the numbers do not match.
    """
    of_images, of_texts = _ranks(images, texts, right, both=True)
    return of_images, of_texts


def _ranks(
    anchors: Tensor, candidates: Tensor, right: Right, *, both: bool
) -> tuple[Int[Tensor, " N"], Int[Tensor, " M"]]:
    """Scores are made twice in blocks of the same shape, first those with right pairs in them: a score compared with
    itself is then equal to the last bit, which a product computed otherwise is not."""
    if len(right) != len(anchors):
        raise ValueError(f"{len(anchors)} anchors but right candidates for {len(right)}")
    if any(not positions for positions in right):
        raise ValueError("every anchor needs at least one right candidate")
    pairs = _RightPairs.of(right)
    if both and len(pairs.columns.unique()) < len(candidates):
        raise ValueError("every candidate must be right for at least one anchor")
    dtype = _raised(anchors[:0]).dtype
    best = [torch.full((len(side),), -torch.inf, dtype=dtype) for side in (anchors, candidates)]
    for block in pairs.starts:
        scores, places = _rows(anchors, block[0]) @ _columns(candidates, block[1]), pairs.within(block)
        found = scores[places]
        for side, (size, place) in enumerate(zip((_ROWS, _COLUMNS), places, strict=True)):
            with np.errstate(invalid="ignore"):  # NaN stays NaN
                np.maximum.at(best[side].numpy(), (place + block[side] * size).numpy(), found.numpy())
    counts = [torch.ones(len(side), dtype=torch.long) for side in (anchors, candidates)]
    for row in range(-(-len(anchors) // _ROWS)):
        rows = _rows(anchors, row)
        for column in range(-(-len(candidates) // _COLUMNS)):
            scores, places = rows @ _columns(candidates, column), pairs.within((row, column))
            for side, at in enumerate((_at(row, _ROWS), _at(column, _COLUMNS))[: 1 + both]):
                # So written, NaN counts against the model too.
                at_least = ~(scores < (best[0][at, None] if side == 0 else best[1][None, at]))
                at_least[places] = False
                # numpy counts booleans ten times as fast as torch adds them up.
                counts[side][at] += torch.from_numpy(np.count_nonzero(at_least.numpy(), axis=1 - side))
    return counts[0], counts[1]


def _at(block: int, size: int) -> slice:
    return slice(block * size, (block + 1) * size)


def _rows(anchors: Tensor, block: int) -> Float[Tensor, "rows D"]:
    return _raised(anchors[_at(block, _ROWS)])


def _columns(candidates: Tensor, block: int) -> Float[Tensor, "D columns"]:
    return _raised(candidates[_at(block, _COLUMNS)]).T


def _raised(features: Tensor) -> Tensor:
    """Half precision as float32, in which products of it are exact and their sums are not cut to half again."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


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


@dataclass(frozen=True)
class Calibration:
    """Confidence against truth, in bins of equal width."""

    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    """Mean of each bin; 0 where it is empty."""
    accuracy: tuple[float, ...]

    @property
    def error(self) -> float:
        """ECE (arXiv:1706.04599, equation 3): mean |accuracy − confidence| over items."""
        total = max(1, sum(self.counts))
        gaps = zip(self.counts, self.confidence, self.accuracy, strict=True)
        return sum(count * abs(accuracy - confidence) for count, confidence, accuracy in gaps) / total

    def to_json(self) -> dict[str, list[float]]:
        """Plain values, for the reliability diagram."""
        return {"counts": list(self.counts), "confidence": list(self.confidence), "accuracy": list(self.accuracy)}


def calibration(confidence: Float[Tensor, " N"], correct: Float[Tensor, " N"], *, bins: int = 15) -> Calibration:
    """How often those are right that are this sure; bin b holds confidences in (b/bins, (b+1)/bins]."""
    place = ((confidence.double() * bins).ceil().long() - 1).clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins)
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums[0].index_add_(0, place, confidence.double())
    sums[1].index_add_(0, place, correct.double())
    means = sums / counts.clamp(min=1)
    return Calibration(tuple(counts.tolist()), tuple(means[0].tolist()), tuple(means[1].tolist()))


def average_precision(scores: Float[Tensor, "N C"], truth: Bool[Tensor, "N C"]) -> Float[Tensor, " C"]:
    """Area under each class's precision over recall: the mean of the precision at each of its items. Among equal scores
    wrong items come first. NaN for a class without items."""
    wrong_first = torch.argsort(truth.to(torch.uint8), dim=0, stable=True)
    order = wrong_first.gather(0, torch.argsort(scores.gather(0, wrong_first), dim=0, descending=True, stable=True))
    ranked = truth.gather(0, order).double()
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1, dtype=torch.float64)[:, None]
    return (precision * ranked).sum(0) / ranked.sum(0)


def bootstrap_interval(
    values: Float[Tensor, " N"],
    clusters: Int[Tensor, " N"] | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the mean over items drawn with replacement.

    For values of 0 and 1 the number of ones in a draw is binomial, so no item is touched twice.

    Args:
        clusters: items of the same number are drawn together, for they are not independent; none: each by itself.
    """
    if clusters is not None:
        both = torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], 1)
        sums = bootstrap_sums(cluster_sums(both, clusters), samples=samples, seed=seed)
        return percentiles(sums[:, 0] / sums[:, 1], level=level)
    rng = np.random.default_rng(seed)
    items = values.double().numpy()
    if np.isin(items, (0.0, 1.0)).all():
        means = rng.binomial(len(items), items.mean(), size=samples) / len(items)
    else:
        means = np.array([items[rng.integers(0, len(items), len(items))].mean() for _ in range(samples)])
    return percentiles(torch.from_numpy(means), level=level)


def bootstrap_sums(rows: Float[Tensor, "N K"], *, samples: int = 1000, seed: int = 0) -> Float[Tensor, "S K"]:
    """Sums over as many rows drawn with replacement, S times: for figures that are no means but functions of sums."""
    rng = np.random.default_rng(seed)
    values = rows.double().numpy()
    draws = (np.bincount(rng.integers(0, len(rows), len(rows)), minlength=len(rows)) for _ in range(samples))
    return torch.from_numpy(np.stack([counts @ values for counts in draws]))


def cluster_sums(rows: Float[Tensor, "N K"], clusters: Int[Tensor, " N"]) -> Float[Tensor, "C K"]:
    """Sums over the rows of each cluster; clusters are numbered from 0."""
    sums = torch.zeros(int(clusters.max()) + 1, rows.shape[1], dtype=torch.float64)
    return sums.index_add_(0, clusters, rows.double())


def percentiles(draws: Float[Tensor, " S"], *, level: float = 0.95) -> tuple[float, float]:
    """The interval in which this share of the draws lies, as much left out below as above."""
    low, high = np.quantile(draws.numpy(), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def class_ranks(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Rank of each row's right class, from scores: 1 + the number of other classes that score at least as high."""
    return (~(scores < scores.gather(1, labels[:, None]))).sum(1)


def tolerance(features: Float[Tensor, "N D"], labels: Int[Tensor, " N"]) -> float:
    """Mean of x_i · x_j over all pairs i ≠ j of the same label: how near each other a model leaves what people call
    the same. NaN where there is no such pair.

    Source: arXiv:2012.09740, where the mean is over all pairs and those of different labels count as 0.
    """
    _, places, counts = labels.unique(return_inverse=True, return_counts=True)
    rows = features.double()
    sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64).index_add_(0, places, rows)
    pairs = int((counts * (counts - 1)).sum())
    # Without pairs the difference is rounding, which is not always 0.
    return float((sums.square().sum() - rows.square().sum()) / pairs) if pairs else float("nan")


def skewness(values: Float[Tensor, " N"]) -> float:
    """Third central moment over the third power of the standard deviation (of N, not N - 1); 0 where all are equal."""
    apart = values.double() - values.double().mean()
    spread = apart.square().mean()
    return float(apart.pow(3).mean() / spread.pow(1.5)) if spread > 0 else 0.0
