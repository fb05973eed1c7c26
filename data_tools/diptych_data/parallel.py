"""The same work for many shards, in several processes."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

from diptych import log as logs
from diptych.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 4
"""Items per worker that are under way or wait to be fetched: memory stays bounded."""


def each(work: Callable[[T], R], items: Sequence[T], *, title: str, workers: int | None = None) -> Iterator[R]:
    """`work(item)` for every item, in the items' order, with a progress bar.

    Args:
        work: a function of a module, or a `functools.partial` of one; what it gives back travels between processes.
        workers: processes; none: one for each core. With one worker or one item everything happens in this process.

    Raises:
        DataError: a worker process was killed (memory, or a crash in a decoder).
    """
    workers = min(workers if workers is not None else os.cpu_count() or 1, len(items))
    with logs.progress(title, len(items)) as bar:
        for result in map(work, items) if workers <= 1 else _spread(work, items, workers):
            yield result
            bar.advance()


def _spread(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    # A server that has imported what workers need forks them: cheap as fork, and safe beside threads.
    context = multiprocessing.get_context("forkserver")
    function = work.func if isinstance(work, partial) else work
    context.set_forkserver_preload([function.__module__])
    waiting = deque(items)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        under_way: deque[tuple[T, Future[R]]] = deque()
        try:
            while waiting or under_way:
                while waiting and len(under_way) < workers * _AHEAD:
                    item = waiting.popleft()
                    under_way.append((item, pool.submit(work, item)))
                item, future = under_way.popleft()
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process was killed · near {item} · lower workers if memory ran out, else look at that shard"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's business; of what workers have to say, warnings alone are for people."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.setup(quiet=True)
