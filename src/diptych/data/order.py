"""Which sample comes when: integers only, a pure function of (seed, epoch, lane), whoever reads it.

Per epoch the shards are dealt to lanes by a seeded permutation. A lane reads its shards in order and shuffles within
windows of `window` samples, each by a permutation keyed by (seed, epoch, lane, window number). Global slot n takes the
next sample of lane n mod `lanes`; global batch k is the slots [k·B, (k+1)·B). A lane that ends its epoch starts its
next one. Rank r of W owns the slots n = r mod W, worker w of its N the slots n = r + W·w mod W·N; W·N divides `lanes`,
so each lane has one owner and the global batches do not depend on W or N.

Bias: samples further apart than a window in their lane never swap places within an epoch.
"""

from dataclasses import dataclass

import numpy as np

from diptych.seeding import generator


@dataclass(frozen=True)
class LaneCursor:
    """Where a lane stands: `position` samples of `epoch` are consumed, unusable ones included."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Share:
    """The slots that one reader owns: `offset`, `offset + stride`, …"""

    offset: int
    stride: int

    def slots(self, start: int, stop: int) -> range:
        """Owned slots in [start, stop)."""
        first = start + (self.offset - start) % self.stride
        return range(first, stop, self.stride)

    def lanes(self, lanes: int) -> range:
        """Owned lanes; `stride` must divide `lanes`."""
        return range(self.offset, lanes, self.stride)


def deal(num_shards: int, lanes: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Shard numbers of each lane, in reading order."""
    permutation = generator(seed, "deal", epoch).permutation(num_shards).tolist()
    return [permutation[lane::lanes] for lane in range(lanes)]


def shuffled_window(size: int, *, seed: int, epoch: int, lane: int, window: int) -> np.ndarray:
    """The order in which a window's `size` samples come."""
    return generator(seed, "window", epoch, lane, window).permutation(size)
