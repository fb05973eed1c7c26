"""Which source each slot of a batch takes its sample from: a pure function of seed, slot and what was drawn before.

After n slots, source s should have given the integral of its share over the slots: a piecewise linear function of n,
kept as an exact fraction. A batch draws from each source what is missing to that figure at the batch's end, rounded so
that the batch is full (largest remainders). So every source, and each batch, stays within two samples of its share.

Within the batch, slots are ordered by the fractional part of (slot x golden ratio + seed): consecutive slots are spread
as evenly as can be, and so are the slots of one lane. The first slots in that order go to the first source, and so on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from diptych.seeding import derive

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the multiplication's overflow is the fractional part


@dataclass(frozen=True)
class Mixture:
    """Shares of sources over time."""

    stages: tuple[tuple[int, tuple[Fraction, ...]], ...]
    """(slot from which they hold, share of each source): in the order of slots, the first from 0; shares sum to 1."""
    seed: int

    @property
    def num_sources(self) -> int:
        """How many sources there are."""
        return len(self.stages[0][1])

    def target(self, slot: int) -> list[Fraction]:
        """Samples that each source should have given before `slot`."""
        given = [Fraction(0)] * self.num_sources
        ends = [*(start for start, _ in self.stages[1:]), math.inf]
        for (start, shares), end in zip(self.stages, ends, strict=True):
            length = max(min(slot, end) - start, 0)
            given = [so_far + int(length) * share for so_far, share in zip(given, shares, strict=True)]
        return given

    def draws(self, slot: int, size: int, drawn: Sequence[int]) -> list[int]:
        """Samples of each source in the batch [slot, slot + size), `drawn` having been taken before it; sum: `size`."""
        missing = [
            max(target - before, Fraction(0)) for target, before in zip(self.target(slot + size), drawn, strict=True)
        ]
        counts = [math.floor(figure) for figure in missing]
        by_remainder = sorted(range(len(counts)), key=lambda s: (counts[s] - missing[s], s))
        for source in by_remainder[: max(size - sum(counts), 0)]:
            counts[source] += 1
        for source in reversed(
            by_remainder
        ):  # only where a source was ahead by a fraction and the others filled the batch
            surplus = sum(counts) - size
            if surplus <= 0:
                break
            counts[source] -= min(counts[source], 1)
        return counts

    def assign(self, slot: int, counts: Sequence[int]) -> np.ndarray:
        """The source of each slot of the batch that begins at `slot`: int64 [batch]."""
        size = sum(counts)
        if len(counts) == 1:
            return np.zeros(size, np.int64)
        slots = np.arange(slot, slot + size, dtype=np.uint64)
        place = slots * _GOLDEN + np.uint64(derive(self.seed, "mixture"))
        sources = np.empty(size, np.int64)
        sources[np.argsort(place, kind="stable")] = np.repeat(np.arange(len(counts)), counts)
        return sources


def shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Weights as exact shares of 1; not all zero."""
    exact = [Fraction(str(weight)) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)
