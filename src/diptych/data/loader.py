"""Workers that turn lanes into batches, and the plain reader of evaluation sets."""

import contextlib
import logging
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diptych.config import Config
from diptych.data import captions as texts
from diptych.data import stream
from diptych.data.augment import augment, draw
from diptych.data.batch import Batch, Chunk, Cursors, merge
from diptych.data.captions import CaptionConfig
from diptych.data.faults import FaultCounter, UnusableSample
from diptych.data.images import ImageConfig, decode, evaluation_view, picture_extension, training_pixels
from diptych.data.order import LaneCursor, Share
from diptych.data.stream import LanePlan, RawSample
from diptych.data.tokens import Tokenizer
from diptych.errors import ConfigError, DataError
from diptych.seeding import derive, generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig(Config):
    """The training data and how it is read."""

    shards: str
    """Folder of shards, a glob, or a brace pattern such as `data/{000000..000099}.tar`."""
    lanes: int = 64
    """Parallel streams; fixes the global order. A multiple of ranks × workers, at most the number of shards."""
    shuffle_window: int = 5000
    """Samples shuffled together within a lane, held in memory as raw bytes per lane."""
    workers: int = 2
    """Loader processes per rank; 0 prepares samples in the training process."""
    images: ImageConfig = field(default_factory=ImageConfig)
    """Crop and augmentation."""
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    """Which caption a picture gets."""
    cache_mib: int = 0
    """Memory per worker for prepared pictures, MiB: small sets are decoded once, where images.min_crop is 1."""
    max_bad_fraction: float = 0.01
    """The run stops when more than this share of the samples is unusable."""

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.shuffle_window < 1 or self.workers < 0 or self.cache_mib < 0:
            raise ValueError("lanes and shuffle_window must be at least 1, workers and cache_mib at least 0")


@dataclass(frozen=True)
class Feed:
    """What a run asks of its data."""

    global_batch: int
    rank: int
    world_size: int
    seed: int
    image_size: int
    tokenizer: Tokenizer


class Loader:
    """The batches of one rank. Built by `build_loader`."""

    def __init__(self, config: DataConfig, feed: Feed, shards: tuple[str, ...]) -> None:
        self._config, self._feed, self._shards = config, feed, shards
        counts = [stream.num_samples(shard) for shard in shards]
        self.num_samples = sum(count for count in counts if count is not None)
        """Samples in one epoch; remote shards without index are not counted."""
        self._all_counted = None not in counts

    def check(self) -> None:
        """Raises ConfigError or DataError where the settings do not fit each other or the data."""
        config, feed = self._config, self._feed
        readers = feed.world_size * max(config.workers, 1)
        if feed.global_batch % feed.world_size:
            raise ConfigError(f"global_batch ({feed.global_batch}) is no multiple of the {feed.world_size} ranks")
        if config.lanes % readers:
            raise ConfigError(
                f"data.lanes ({config.lanes}) is no multiple of ranks × workers ({feed.world_size} × "
                f"{max(config.workers, 1)}) · change data.lanes or data.workers"
            )
        if config.lanes > len(self._shards):
            raise ConfigError(
                f"data.lanes ({config.lanes}) exceeds the number of shards ({len(self._shards)}) · {config.shards} · "
                "lower data.lanes, or pack into smaller shards"
            )
        if self._all_counted and feed.global_batch > self.num_samples:
            raise ConfigError(
                f"global_batch ({feed.global_batch}) is larger than the data ({self.num_samples} samples) · "
                f"{config.shards} · lower global_batch"
            )

    def batches(self, start: Cursors | None = None) -> contextlib.closing[Generator[Batch]]:
        """Endless batches from `start` (None: the beginning), as a context manager that ends the workers."""
        return contextlib.closing(self._generate(start))

    def _generate(self, start: Cursors | None) -> Generator[Batch]:
        config = self._config
        dataset = _Chunks(config, self._feed, self._shards, start)
        chunks = iter(
            DataLoader(
                dataset,
                batch_size=None,
                num_workers=config.workers,
                prefetch_factor=4 if config.workers else None,
                multiprocessing_context="fork" if config.workers else None,
                worker_init_fn=_one_thread if config.workers else None,
            )
        )
        faults = FaultCounter(config.max_bad_fraction)
        while True:
            # The loader takes workers in turn, so this many consecutive chunks are one batch.
            parts = [next(chunks) for _ in range(max(config.workers, 1))]
            bad = [fault for part in parts for fault in part.bad]
            faults.add(sum(len(part.keys) for part in parts), bad)
            yield merge(parts, Counter(reason for reason, _ in bad))


def build_loader(config: DataConfig, feed: Feed) -> Loader:
    """The loader of one rank.

    Raises:
        ConfigError: lanes, workers, ranks and batch do not fit each other or the data.
        DataError: there are no shards.
    """
    loader = Loader(config, feed, stream.list_shards(config.shards))
    loader.check()
    return loader


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class _Prepared:
    """One usable sample."""

    key: str
    caption: str
    hard_captions: tuple[str, ...]
    pixels: np.ndarray
    """uint8 RGBA [4, size, size]."""
    draws: np.ndarray
    """What decides its augmentation."""


class _Chunks(IterableDataset[Chunk]):
    """Each reader's part of one global batch after another."""

    def __init__(self, config: DataConfig, feed: Feed, shards: tuple[str, ...], start: Cursors | None) -> None:
        self._config, self._feed, self._shards = config, feed, shards
        self._start = start if start is not None else Cursors(0, {})
        self._cache = PixelCache(config.cache_mib * 2**20)

    def __iter__(self) -> Iterator[Chunk]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        world = self._feed.world_size
        share = Share(offset=self._feed.rank + world * number, stride=world * workers)
        cursors = {lane: self._start.lanes.get(lane, LaneCursor()) for lane in share.lanes(self._config.lanes)}
        lanes = {lane: stream.lane_samples(self._plan(lane), cursor) for lane, cursor in cursors.items()}
        slot = self._start.slot
        while True:
            slots = tuple(share.slots(slot, slot + self._feed.global_batch))
            slot += self._feed.global_batch
            bad: list[tuple[str, str]] = []
            samples = []
            for wanted in slots:
                lane = wanted % self._config.lanes
                samples.append(self._next_usable(lane, lanes[lane], cursors, bad))
            yield self._chunk(slots, samples, Cursors(slot, dict(cursors)), tuple(bad))

    def _plan(self, lane: int) -> LanePlan:
        config = self._config
        return LanePlan(self._shards, lane, config.lanes, self._feed.seed, config.shuffle_window)

    def _chunk(
        self, slots: tuple[int, ...], samples: list[_Prepared], cursors: Cursors, bad: tuple[tuple[str, str], ...]
    ) -> Chunk:
        captions = [sample.caption for sample in samples]
        tokens = self._feed.tokenizer(captions) if captions else torch.empty(0, 1, dtype=torch.long)
        ids = torch.tensor([derive(0, caption) for caption in captions], dtype=torch.long)
        keys = tuple(sample.key for sample in samples)
        return Chunk(slots, self._views(samples), tokens, keys, ids, self._hard_tokens(samples, tokens), cursors, bad)

    def _hard_tokens(self, samples: list[_Prepared], tokens: Int[Tensor, "n context"]) -> Int[Tensor, "n K context"]:
        hard = self._config.captions.hard
        texts_of_all = [text for sample in samples for text in sample.hard_captions]
        if hard is None or not texts_of_all:
            return tokens.new_zeros(len(samples), hard.count if hard is not None else 0, tokens.shape[1])
        return self._feed.tokenizer(texts_of_all).view(len(samples), hard.count, -1)

    def _views(self, samples: list[_Prepared]) -> UInt8[Tensor, "n 3 side side"]:
        size = self._feed.image_size
        if not samples:
            return torch.empty(0, 3, size, size, dtype=torch.uint8)
        pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
        draws = torch.from_numpy(np.stack([sample.draws for sample in samples]))
        return augment(pixels, draws, self._config.images.augment)

    def _pixels(self, raw: RawSample, rng: np.random.Generator) -> np.ndarray:
        pixels = self._cache.get(raw)
        if pixels is None:
            picture = decode(_picture_bytes(raw), at_least=self._feed.image_size)
            pixels = training_pixels(picture, self._feed.image_size, self._config.images, rng)
            if self._config.images.min_crop == 1:
                self._cache.put(raw, pixels)
        return pixels

    def _next_usable(
        self,
        lane: int,
        samples: Iterator[tuple[RawSample, LaneCursor]],
        cursors: dict[int, LaneCursor],
        bad: list[tuple[str, str]],
    ) -> _Prepared:
        """The lane's next sample that can be used; moves its cursor past it and past the unusable ones before it."""
        for raw, cursor in samples:
            cursors[lane] = cursor
            rng = generator(self._feed.seed, "sample", cursor.epoch, lane, cursor.position)
            try:
                columns = texts.read(raw.members)
                caption = texts.choose(columns, self._config.captions, rng)
                pixels = self._pixels(raw, rng)
                draws = draw(rng)
                hard = texts.choose_hard(columns, self._config.captions, rng)
                return _Prepared(raw.key, caption, hard, pixels, draws)
            except UnusableSample as fault:
                bad.append((fault.reason, raw.shard))
                if len(bad) >= _GIVE_UP:
                    raise DataError(
                        f"{len(bad)} unusable samples in a row, the last {raw.key!r} ({fault}) · {raw.shard} · "
                        "check data.shards and data.captions.views"
                    ) from fault
        raise AssertionError("lanes are endless")


class PixelCache:
    """Remembers prepared pictures where every epoch prepares them alike (no random crop): the first that fit stay."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._kept: dict[tuple[str, str], np.ndarray] = {}

    def get(self, raw: RawSample) -> np.ndarray | None:
        """The pixels, if they are known."""
        return self._kept.get((raw.shard, raw.key))

    def put(self, raw: RawSample, pixels: np.ndarray) -> None:
        """Keeps the pixels while there is room."""
        if pixels.nbytes <= self._left:
            self._left -= pixels.nbytes
            self._kept[raw.shard, raw.key] = np.ascontiguousarray(pixels)


_GIVE_UP = 10_000


def _picture_bytes(raw: RawSample) -> bytes:
    extension = picture_extension(raw.members)
    if extension is None:
        raise UnusableSample("no_picture")
    return raw.members[extension]


# --- evaluation --------------------------------------------------------------------------------------------------

_THUMBNAIL = 64


@dataclass(frozen=True)
class EvalSample:
    """One sample of an evaluation set."""

    key: str
    image: UInt8[Tensor, "3 size size"]
    """What the model sees."""
    thumbnail: UInt8[Tensor, "3 side side"]
    """What people see: 64 pixels, whatever the model's size."""
    captions: dict[str, tuple[str, ...]]
    """Column → texts."""
    label: int | None
    """Class index from the .cls member."""
    meta: dict[str, str]
    """The other columns."""


def read_split(shards: str, image_size: int) -> Iterator[EvalSample]:
    """Every sample once, in order, in the evaluation view; unusable ones are skipped, counted and reported at the end.

    Raises:
        DataError: there are no shards.
    """
    skipped: Counter[str] = Counter()
    for shard in stream.list_shards(shards):
        for raw in stream.read_shard(shard):
            try:
                picture = decode(_picture_bytes(raw))  # whole: a reduced decoding would not be the published protocols'
                image, thumbnail = evaluation_view(picture, image_size), evaluation_view(picture, _THUMBNAIL)
                yield EvalSample(raw.key, image, thumbnail, texts.read(raw.members), _label(raw), _meta(raw))
            except UnusableSample as fault:
                skipped[fault.reason] += 1
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        log.warning("samples left out of evaluation: %s shards=%s", reasons, Path(shards))


def _label(raw: RawSample) -> int | None:
    if "cls" not in raw.members:
        return None
    try:
        return int(raw.members["cls"])
    except ValueError as error:
        raise UnusableSample("bad_label", str(error)) from error


def _meta(raw: RawSample) -> dict[str, str]:
    import json

    document = json.loads(raw.members["json"]) if "json" in raw.members else {}
    return {str(key): str(value) for key, value in document.get("meta", {}).items()}
