"""Counted values in short: quantiles, bins, repetitions."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distribution:
    """A column of numbers in short."""

    count: int
    mean: float
    min: float
    p5: float
    p25: float
    median: float
    p75: float
    p95: float
    max: float


def distribution(counts: "Counter[int] | Counter[float]") -> Distribution | None:
    """Exact quantiles (the smallest value that is not below the share) of counted values; None where there are none."""
    if not counts:
        return None
    values = np.array(sorted(counts), np.float64)
    weights = np.array([times for _, times in sorted(counts.items())])
    ends = weights.cumsum()
    total = int(ends[-1])

    def at(share: float) -> float:
        return float(values[np.searchsorted(ends, share * total)])

    mean = float((values * weights).sum() / total)
    return Distribution(
        total, mean, float(values[0]), at(0.05), at(0.25), at(0.5), at(0.75), at(0.95), float(values[-1])
    )


class Repetitions:
    """What occurs how often, from the hashes of all parts."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._ends = np.cumsum([len(part) for part in parts])
        everything = np.concatenate([np.empty(0, np.uint64), *parts])
        _, self._first, self._times = np.unique(everything, return_index=True, return_counts=True)
        self.repeated = len(everything) - len(self._times)

    def most(self, number: int) -> Iterator[tuple[int, int, int]]:
        """(times, part, place in the part) of the most frequent that occur more than once; ties: the earlier first."""
        for one in np.lexsort((self._first, -self._times))[:number]:
            if self._times[one] > 1:
                part = int(np.searchsorted(self._ends, self._first[one], side="right"))
                before = int(self._ends[part - 1]) if part else 0
                yield int(self._times[one]), part, int(self._first[one]) - before


def histogram(counts: "Counter[int] | Counter[float]", bins: np.ndarray) -> np.ndarray:
    """Counted values in bins; what lies outside falls into the first or last."""
    values = np.fromiter(counts, np.float64, len(counts)).clip(bins[0], bins[-1])
    return np.histogram(values, bins, weights=np.fromiter(counts.values(), np.float64, len(counts)))[0]
