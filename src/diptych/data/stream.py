"""Shards to entries, lane by lane: an endless stream in the order of `diptych.data.order`.

Each entry of a shard (a sample, or the shard's own fault) takes one place in its lane. An entry is read when its turn
comes; a window holds places, not bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from diptych.data.order import LaneCursor, deal, shuffled_window
from diptych.data.shards import OpenShard, RawSample, ShardStore
from diptych.errors import DataError

_AHEAD = 2
"""Remote shards of a lane that are fetched while one is read."""
_EMPTY_EPOCHS = 100
"""A lane may draw only empty shards now and then, not this many times in a row."""


class Entry(NamedTuple):
    """One place of a lane."""

    shard: OpenShard
    number: int

    def read(self) -> RawSample:
        """The sample. Raises UnusableSample."""
        return self.shard.read(self.number)


@dataclass(frozen=True)
class LanePlan:
    """Everything that decides a lane's order."""

    shards: tuple[str, ...]
    lane: int
    lanes: int
    seed: int
    window: int


def lane_entries(plan: LanePlan, start: LaneCursor, store: ShardStore) -> Iterator[tuple[Entry, LaneCursor]]:
    """The endless stream of a lane from `start`; each entry with the cursor that stands behind it.

    Raises:
        DataError: the shards hold no samples at all.
    """
    epoch, position, empty_epochs = start.epoch, start.position, 0
    while True:
        count = 0
        for count, entry in enumerate(_epoch(plan, epoch, position, store), start=1):
            yield entry, LaneCursor(epoch, position + count)
        empty_epochs = 0 if count or position else empty_epochs + 1
        if empty_epochs == _EMPTY_EPOCHS:
            raise DataError(
                f"no samples in {_EMPTY_EPOCHS} epochs of lane {plan.lane} · {plan.shards[0]} … · are the shards empty?"
            )
        epoch, position = epoch + 1, 0


def _epoch(plan: LanePlan, epoch: int, position: int, store: ShardStore) -> Iterator[Entry]:
    """One lane-epoch from `position` on, in shuffled windows; goes back to the start of the window of `position`."""
    number, offset = divmod(position, plan.window)
    window: list[Entry] = []
    for entry in _entries_from(plan, epoch, number * plan.window, store):
        window.append(entry)
        if len(window) == plan.window:
            yield from _shuffled(window, plan, epoch, number, offset)
            window, number, offset = [], number + 1, 0
    if window:
        yield from _shuffled(window, plan, epoch, number, offset)


def _shuffled(window: list[Entry], plan: LanePlan, epoch: int, number: int, offset: int) -> Iterator[Entry]:
    order = shuffled_window(len(window), seed=plan.seed, epoch=epoch, lane=plan.lane, window=number)
    return (window[i] for i in order[offset:])


def _entries_from(plan: LanePlan, epoch: int, skip: int, store: ShardStore) -> Iterator[Entry]:
    """All entries of a lane-epoch after the first `skip`; whole shards are passed over by their counts."""
    dealt = deal(len(plan.shards), plan.lanes, seed=plan.seed, epoch=epoch)[plan.lane]
    shards = [plan.shards[number] for number in dealt]
    for place, shard in enumerate(shards):
        count = store.num_entries(shard) if skip else None
        if count is not None and count <= skip:
            skip -= count
            continue
        for following in shards[place + 1 : place + 1 + _AHEAD]:
            store.prepare(following)
        opened = store.open(shard)
        yield from (Entry(opened, number) for number in range(min(skip, opened.num_entries), opened.num_entries))
        skip = max(skip - opened.num_entries, 0)
