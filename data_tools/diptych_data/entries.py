"""What the tools read: the entries of shards, all of them or some, faults included."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diptych.data.faults import UnusableSample
from diptych.data.shards import ShardStore
from diptych.errors import DataError


@dataclass(frozen=True)
class Entry:
    """One sample of a shard, or its fault."""

    shard: str
    number: int
    """Place in the shard, from 0."""
    key: str
    members: dict[str, bytes]
    """Extension → content, in the tar's order; empty where there is a fault."""
    fault: str = ""
    """Why it cannot be read, as `diptych.data.faults` names it; empty: it can."""


@dataclass(frozen=True)
class Part:
    """A shard, or some of its entries."""

    shard: str
    numbers: tuple[int, ...] | None = None
    """Places in the shard, ascending; none: all."""

    def __str__(self) -> str:
        return self.shard

    def __len__(self) -> int:
        if self.numbers is None:
            raise ValueError("the size of a whole shard is not known before it is opened")
        return len(self.numbers)


def whole(shards: Iterable[str]) -> list[Part]:
    """Every entry of the shards."""
    return [Part(shard) for shard in shards]


def read(part: Part) -> Iterator[Entry]:
    """The entries in their order. An entry that cannot be read has a fault and no members."""
    opened = ShardStore().open(part.shard)
    for number in part.numbers if part.numbers is not None else range(opened.num_entries):
        key = opened.key(number)
        try:
            yield Entry(part.shard, number, key, opened.read(number).members)
        except UnusableSample as fault:
            # Without a reason: the shard was replaced after it was counted.
            yield Entry(part.shard, number, key, {}, fault.reason or "unreadable")


def keys(shard: str) -> list[str]:
    """The keys of a shard in its order; its own fault has the empty one."""
    opened = ShardStore().open(shard)
    return [opened.key(number) for number in range(opened.num_entries)]


def count(shards: Sequence[str]) -> list[int]:
    """Entries of each shard, from the sidecars where there are any.

    Raises:
        DataError: a shard does not say how many it holds before it is read.
    """
    store = ShardStore()
    counts = []
    for shard in shards:
        number = store.num_entries(shard)
        if number is None:
            raise DataError(f"number of samples is not known · {shard} · copy it here, or write its index beside it")
        counts.append(number)
    return counts


def draw(shards: Sequence[str], number: int, *, seed: int) -> list[Part]:
    """`number` entries of all shards, each as likely as the next, in the shards' order; all where there are fewer."""
    counts = count(shards)
    total = sum(counts)
    chosen = np.random.default_rng(seed).choice(total, min(number, total), replace=False, shuffle=False)
    return locate(shards, counts, np.sort(chosen))


def locate(shards: Sequence[str], counts: Sequence[int], positions: np.ndarray) -> list[Part]:
    """The parts that hold ascending positions in the row of all entries; shards without any are left out."""
    ends = np.cumsum(counts)
    cuts = np.searchsorted(positions, ends)
    parts = []
    for shard, size, end, numbers in zip(shards, counts, ends, np.split(positions, cuts)[:-1], strict=True):
        if len(numbers):
            parts.append(Part(shard, tuple((numbers - (end - size)).tolist())))
    return parts
