"""Shards to raw samples, lane by lane. Webdataset opens and reads; the order is `diptych.data.order`'s."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import braceexpand
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_iterator

from diptych.data import index
from diptych.data.index import ShardIndex
from diptych.data.order import LaneCursor, deal, shuffled_window
from diptych.errors import DataError


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in the shard."""

    key: str
    members: dict[str, bytes]
    """Extension → content."""
    shard: str


@dataclass(frozen=True)
class LanePlan:
    """Everything that decides a lane's order."""

    shards: tuple[str, ...]
    lane: int
    lanes: int
    seed: int
    window: int


def list_shards(pattern: str) -> tuple[str, ...]:
    """Shards in a folder (all `.tar`, sorted), of a glob, or of a brace pattern `{000000..000099}.tar`; URLs pass.

    Raises:
        DataError: there are none.
    """
    path = Path(pattern)
    if path.is_dir():
        found = sorted(str(shard) for shard in path.glob("*.tar"))
        problem = "folder holds no .tar shards"
    elif "*" in pattern or "?" in pattern:
        found = (
            sorted(str(shard) for shard in Path().glob(pattern))
            if not path.is_absolute()
            else sorted(str(shard) for shard in Path("/").glob(pattern.lstrip("/")))
        )
        problem = "no shard matches the pattern"
    else:
        found = list(braceexpand.braceexpand(pattern))
        missing = [shard for shard in found if "://" not in shard and not shard.startswith("pipe:")]
        missing = [shard for shard in missing if not Path(shard).is_file()]
        problem = f"no such folder or shard ({missing[0]})" if missing else ""
        found = [] if missing else found
    if not found:
        raise DataError(f"{problem} · {pattern} · make shards with `diptych data pack`, or correct the path")
    return tuple(found)


def read_shard(shard: str) -> Iterator[RawSample]:
    """The samples of one shard in the order they lie in it: by its index if there is one, else by reading the tar."""
    known = index.read(Path(shard)) if Path(shard).is_file() else None
    return _read_tar(shard) if known is None else _read_indexed(shard, known)


def _read_indexed(shard: str, known: ShardIndex) -> Iterator[RawSample]:
    """Members by their offsets: about a tenth of the time of parsing headers."""
    with Path(shard).open("rb") as file:
        for sample in known.samples:
            members = {}
            for extension, place in sample.members.items():
                file.seek(place.offset)
                members[extension] = file.read(place.size)
            yield RawSample(sample.key, members, shard)


def _read_tar(shard: str) -> Iterator[RawSample]:
    with gopen(shard) as file:
        members = (record | {"__url__": shard} for record in tar_file_iterator(file))
        for sample in group_by_keys(members):
            # Since version 1, webdataset emits records without a key at the end of a shard.
            if "__key__" in sample:
                content = {name: data for name, data in sample.items() if not name.startswith("__")}
                yield RawSample(sample["__key__"], content, shard)


@lru_cache(maxsize=65536)
def num_samples(shard: str) -> int | None:
    """Samples in a local shard; None for a remote one, which has to be read to know."""
    return index.count(Path(shard)) if Path(shard).is_file() else None


def lane_samples(plan: LanePlan, start: LaneCursor) -> Iterator[tuple[RawSample, LaneCursor]]:
    """The endless stream of a lane from `start`; each sample with the cursor that stands behind it.

    Raises:
        DataError: the shards hold no samples at all.
    """
    epoch, position, empty_epochs = start.epoch, start.position, 0
    while True:
        shards = [
            plan.shards[number] for number in deal(len(plan.shards), plan.lanes, seed=plan.seed, epoch=epoch)[plan.lane]
        ]
        count = 0
        for count, sample in enumerate(_epoch(shards, plan, epoch, position), start=1):
            yield sample, LaneCursor(epoch, position + count)
        empty_epochs = 0 if count or position else empty_epochs + 1
        if empty_epochs == 100:  # a lane may draw only empty shards now and then, not a hundred times in a row
            raise DataError(
                f"no samples in 100 epochs of lane {plan.lane} · {plan.shards[0]} … · are the shards empty?"
            )
        epoch, position = epoch + 1, 0


def _epoch(shards: Sequence[str], plan: LanePlan, epoch: int, position: int) -> Iterator[RawSample]:
    """One lane-epoch from `position` on, in shuffled windows; re-reads at most the window that holds `position`."""
    number = position // plan.window
    offset = position - number * plan.window
    window: list[RawSample] = []
    for sample in _read_from(shards, number * plan.window):
        window.append(sample)
        if len(window) == plan.window:
            yield from _shuffled(window, plan, epoch, number, offset)
            window, number, offset = [], number + 1, 0
    if window:
        yield from _shuffled(window, plan, epoch, number, offset)


def _shuffled(window: list[RawSample], plan: LanePlan, epoch: int, number: int, offset: int) -> Iterator[RawSample]:
    order = shuffled_window(len(window), seed=plan.seed, epoch=epoch, lane=plan.lane, window=number)
    return (window[i] for i in order[offset:])


def _read_from(shards: Sequence[str], skip: int) -> Iterator[RawSample]:
    """All samples of the shards after the first `skip`; whole shards are passed over by their counts."""
    for shard in shards:
        count = num_samples(shard) if skip else None
        if count is not None and count <= skip:
            skip -= count
            continue
        for sample in read_shard(shard):
            if skip:
                skip -= 1
            else:
                yield sample
