"""Workers that turn lanes into batches."""

import contextlib
import gc
import signal
from collections.abc import Generator, Iterator
from functools import cached_property

import torch
from torch.utils.data import DataLoader

from diptych.data.batch import Batch, Chunk, Cursors, merge
from diptych.data.reader import Chunks, Feed, Reading
from diptych.data.remote import is_remote
from diptych.data.shards import Scratch, ShardStore
from diptych.data.sources import DataConfig, Source, mixture, resolve
from diptych.errors import ConfigError, DataError, DiptychError

_GRACE_SECONDS = 60


class Loader:
    """The batches of one rank. Built by `build_loader`."""

    def __init__(self, config: DataConfig, feed: Feed, sources: tuple[Source, ...]) -> None:
        self._config, self._feed, self.sources = config, feed, sources
        self._counts = ShardStore()

    @cached_property
    def num_samples(self) -> int | None:
        """Entries of all shards, unusable ones included; None where remote shards leave it open."""
        counts = list(self._shard_counts())
        return None if None in counts else sum(count for count in counts if count is not None)

    def _shard_counts(self) -> Iterator[int | None]:
        for source in self.sources:
            for shard in source.shards:
                yield None if is_remote(shard) else self._counts.num_entries(shard)

    def check(self) -> None:
        """Raises ConfigError or DataError where the settings do not fit each other or the data."""
        feed = self._feed
        if feed.global_batch % feed.world_size:
            raise ConfigError(f"global_batch ({feed.global_batch}) is no multiple of the {feed.world_size} ranks")
        for source in self.sources:
            self._check_lanes(source)
        self._check_size()

    def _check_lanes(self, source: Source) -> None:
        workers = max(self._config.workers, 1)
        name = f"data.sources {source.name!r}: lanes" if source.name else "data.lanes"
        if source.lanes % (self._feed.world_size * workers):
            raise ConfigError(
                f"{name} ({source.lanes}) is no multiple of ranks × workers ({self._feed.world_size} × {workers}) · "
                "change the lanes or data.workers"
            )
        if source.lanes > len(source.shards):
            raise ConfigError(
                f"{name} ({source.lanes}) exceeds the number of shards ({len(source.shards)}) · {source.pattern} · "
                "lower the lanes, or pack into smaller shards"
            )

    def _check_size(self) -> None:
        """Counts only until there are enough: ten thousand shards need not be counted to start."""
        counted = 0
        for count in self._shard_counts():
            if count is None or (counted := counted + count) >= self._feed.global_batch:
                return
        raise ConfigError(
            f"global_batch ({self._feed.global_batch}) is larger than the data ({counted} samples) · "
            f"{', '.join(source.pattern for source in self.sources)} · lower global_batch"
        )

    def batches(self, start: Cursors | None = None) -> contextlib.closing[Generator[Batch]]:
        """Endless batches from `start` (None: the beginning), as a context manager that ends the workers.

        Raises:
            ConfigError: `start` belongs to other shards.
        """
        start = start if start is not None else Cursors()
        for source in self.sources:
            before = start.shards.get(source.name, source.digest)
            if before != source.digest:
                raise ConfigError(
                    f"the run began with other shards ({before.partition(':')[0]} then, {len(source.shards)} now, or "
                    f"other names) · {source.pattern} · restore them (a brace pattern may name missing ones), or start "
                    "a new run"
                )
        return contextlib.closing(self._generate(start))

    def _generate(self, start: Cursors) -> Generator[Batch]:
        config = self._config
        remote = any(is_remote(shard) for source in self.sources for shard in source.shards)
        scratch = Scratch(config.remote) if remote else None
        folder = scratch.folder if scratch is not None else None
        chunks: Iterator[Chunk | DiptychError] = iter(())
        try:
            reading = Reading(config, self._feed, self.sources, mixture(config, self._feed.seed), start, folder)
            gc.freeze()  # or each worker copies, page by page, what its collector looks through
            chunks = iter(
                DataLoader(
                    Chunks(reading),
                    batch_size=None,
                    num_workers=config.workers,
                    prefetch_factor=config.prefetch_batches if config.workers else None,
                    multiprocessing_context="fork" if config.workers else None,
                    worker_init_fn=_one_thread if config.workers else None,
                )
            )
            gc.unfreeze()
            while True:
                # The loader takes workers in turn, so this many consecutive chunks are one batch.
                parts = [_next(chunks) for _ in range(max(config.workers, 1))]
                yield merge(parts, text_multiple=self._feed.text_multiple, pinned=torch.cuda.is_available())
        finally:
            del chunks  # ends the workers, and a prefetch in this process
            if scratch is not None:
                scratch.close()


def _next(chunks: Iterator[Chunk | DiptychError]) -> Chunk:
    try:
        chunk = next(chunks)
    except (RuntimeError, ConnectionError, EOFError) as error:
        # What torch says of a worker that is gone, or what comes of reading a tensor from it.
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise DataError(
            "a loader process was killed, perhaps because memory ran out · data.workers · lower it, "
            "data.prefetch_batches or data.cache_mib, and start the same command again"
        ) from error
    if isinstance(chunk, DiptychError):
        raise chunk
    return chunk


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    # Whoever ends a job signals all its processes. The training process saves first, and needs batches until then.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


def build_loader(config: DataConfig, feed: Feed) -> Loader:
    """The loader of one rank.

    Raises:
        ConfigError: lanes, workers, ranks and batch do not fit each other or the data.
        DataError: there are no shards.
    """
    loader = Loader(config, feed, resolve(config))
    loader.check()
    return loader
