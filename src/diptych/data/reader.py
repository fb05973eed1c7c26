"""What one reading process does: its lanes of every source, sample after sample, as its parts of the global batches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from diptych.data.batch import Chunk, Cursors
from diptych.data.faults import Fault, UnusableSample
from diptych.data.mixture import Mixture
from diptych.data.order import LaneCursor, Share
from diptych.data.prepare import PixelCache, Prepared, prepare, rows
from diptych.data.shards import ShardStore
from diptych.data.sources import DataConfig, Source
from diptych.data.stages import Form, Stage, form_at
from diptych.data.stream import LanePlan, lane_entries
from diptych.data.tokens import Tokenizer
from diptych.errors import DataError, DiptychError
from diptych.seeding import generator

_GIVE_UP_SAMPLES = 10_000
_GIVE_UP_SHARDS = 3


@dataclass(frozen=True)
class Feed:
    """What a run asks of its data."""

    global_batch: int
    rank: int
    world_size: int
    seed: int
    image_size: int
    """Side of the pictures behind the last stage, pixels."""
    tokenizer: Tokenizer
    stages: tuple[Stage, ...] = ()
    teacher_tokenizer: Tokenizer | None = None
    """Of a teacher, which reads every caption in its own ids."""
    text_multiple: int = 1
    """The texts of a batch are padded to a length that is a multiple of this."""

    def form(self, slot: int) -> Form:
        """How large the pictures and how long the captions of the batch that begins at this slot are."""
        return form_at(slot, self.stages, Form(self.image_size, self.tokenizer.context_length))


@dataclass(frozen=True)
class Reading:
    """Everything a reading process needs to know."""

    config: DataConfig
    feed: Feed
    sources: tuple[Source, ...]
    mixture: Mixture
    start: Cursors
    scratch: Path | None
    """Where copies of remote shards go."""


class Chunks(IterableDataset[Chunk | DiptychError]):
    """This reader's part of one global batch after another. An error is the last thing it gives: as a value, because
    a worker's exception reaches the training process as a page of traceback."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def __iter__(self) -> Iterator[Chunk | DiptychError]:
        try:
            yield from self._chunks()
        except DiptychError as error:
            yield error

    def _chunks(self) -> Iterator[Chunk]:
        reading, feed = self._reading, self._reading.feed
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        share = Share(offset=feed.rank + feed.world_size * number, stride=feed.world_size * workers)
        store = ShardStore(reading.config.remote, reading.scratch)
        try:
            yield from self._with(store, share)
        finally:
            store.close()

    def _with(self, store: ShardStore, share: Share) -> Iterator[Chunk]:
        reading, feed = self._reading, self._reading.feed
        cache = PixelCache(reading.config.cache_mib * 2**20)
        lanes = {
            (number, lane): Lane(reading, number, lane, store, cache)
            for number, source in enumerate(reading.sources)
            for lane in share.lanes(source.lanes)
        }
        slot = reading.start.slot
        drawn = [reading.start.drawn.get(source.name, 0) for source in reading.sources]
        while True:
            counts = reading.mixture.draws(slot, feed.global_batch, drawn)
            of_slot = reading.mixture.assign(slot, counts)
            slots = tuple(share.slots(slot, slot + feed.global_batch))
            of = [int(of_slot[wanted - slot]) for wanted in slots]
            form = feed.form(slot)
            faults: list[Fault] = []
            samples = [
                lanes[source, wanted % reading.sources[source].lanes].next_usable(form.image_size, faults)
                for wanted, source in zip(slots, of, strict=True)
            ]
            slot += feed.global_batch
            drawn = [before + count for before, count in zip(drawn, counts, strict=True)]
            batch = rows(
                samples,
                of,
                sources=reading.sources,
                form=form,
                tokenizer=feed.tokenizer,
                teacher_tokenizer=feed.teacher_tokenizer,
            )
            cursors = _cursors(reading.sources, slot, drawn, lanes)
            yield Chunk(slots, tuple(sample.key for sample in samples), batch, cursors, tuple(faults))


def _cursors(sources: tuple[Source, ...], slot: int, drawn: list[int], lanes: dict[tuple[int, int], "Lane"]) -> Cursors:
    return Cursors(
        slot,
        {source.name: count for source, count in zip(sources, drawn, strict=True)},
        {(sources[number].name, lane): reader.cursor for (number, lane), reader in lanes.items()},
        {source.name: source.digest for source in sources},
    )


class Lane:
    """One lane of one source, read from a cursor on."""

    def __init__(self, reading: Reading, number: int, lane: int, store: ShardStore, cache: PixelCache) -> None:
        self._source = source = reading.sources[number]
        self._cache, self._number = cache, lane
        self.cursor = reading.start.lanes.get((source.name, lane), LaneCursor())
        """Behind the last sample given, and the unusable ones before it."""
        plan = LanePlan(
            source.shards, lane, source.lanes, seed_of(reading.feed.seed, source), reading.config.shuffle_window
        )
        self._seed = plan.seed
        self._entries = lane_entries(plan, self.cursor, store)
        self._patience = min(
            max(_GIVE_UP_SHARDS, math.ceil(reading.config.max_bad_fraction * len(source.shards))), len(source.shards)
        )

    def next_usable(self, size: int, faults: list[Fault]) -> Prepared:
        """The next sample that can be used; the unusable ones passed over are appended to `faults`.

        Args:
            size: side of its view, pixels.

        Raises:
            DataError: there seem to be no usable samples any more.
        """
        lost_shards: set[str] = set()
        for passed, (entry, cursor) in enumerate(self._entries):
            self.cursor = cursor
            rng = generator(self._seed, "sample", cursor.epoch, self._number, cursor.position)
            try:
                return prepare(entry.read(), self._source, size, rng=rng, cache=self._cache)
            except UnusableSample as problem:
                fault = Fault(problem.reason, entry.shard.name, entry.shard.key(entry.number))
                faults.append(fault)
                if entry.shard.lost:
                    lost_shards.add(fault.shard)
                if passed + 1 >= _GIVE_UP_SAMPLES or len(lost_shards) >= self._patience:
                    self._give_up(passed + 1, fault, problem)
        raise AssertionError("lanes are endless")

    def _give_up(self, passed: int, fault: Fault, problem: UnusableSample) -> None:
        what = f"{passed} unusable samples in a row, the last {fault.key!r}" if fault.key else "shards cannot be read"
        raise DataError(
            f"{what} ({problem}) · {fault.shard} · check the shards (`diptych data check`), and data.captions.views"
        ) from problem


def seed_of(seed: int, source: Source) -> int:
    """Sources are shuffled independently; a single one by the run's own seed."""
    return int(generator(seed, "source", source.name).integers(2**62)) if source.name else seed
