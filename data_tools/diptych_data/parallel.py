"""The same function on many tasks, in several processes that never outlive the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TypeVar

from diptych import log as logs
from diptych.errors import DataError


class Killed(DataError):
    """A process died of something else than its task: nothing is wrong with the input."""


T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2
"""Tasks per process that are under way or wait."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(work: Callable[[T], R], items: Sequence[T], *, title: str, workers: int | None = None) -> Iterator[R]:
    """`run` with a progress bar; by default one process for each core, and none more than there are items."""
    with logs.progress(title, len(items)) as bar:
        for result in run(work, items, workers=min(workers if workers is not None else cores(), len(items))):
            yield result
            bar.advance()


def run(function: Callable[[T], R], tasks: Iterable[T], *, workers: int) -> Iterator[R]:
    """`function(task)` for each task, in their order; the first failure in that order is raised.

    With one worker everything happens in this process. Whatever ends the iteration early ends the processes at once.

    Raises:
        Killed: a process was.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    # A server process that has imported what workers need forks them: as cheap as fork, and safe beside threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diptych_data.packing.shard", "diptych_data.entries", "diptych_data.pictures"])
    ended, lifeline = context.Pipe(duplex=False)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(ended,)) as pool:
        try:
            yield from _in_order(pool, function, tasks, workers * _AHEAD)
        except BrokenProcessPool as error:
            raise Killed(
                f"a worker process was killed · {workers} workers · lower workers if memory ran out; the same command "
                "goes on, or begins again"
            ) from error
        except BaseException:
            lifeline.close()
            raise
    lifeline.close()
    ended.close()


def _in_order(pool: ProcessPoolExecutor, function: Callable[[T], R], tasks: Iterable[T], ahead: int) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    for task in tasks:
        waiting.append(pool.submit(function, task))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _begin(ended: Connection) -> None:
    """First thing in a worker: Ctrl-C is the parent's to answer, and its end, however it comes, is ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.setup(quiet=True)  # of what workers have to say, warnings alone are for people
    threading.Thread(target=_follow, args=(ended,), daemon=True).start()


def _follow(ended: Connection) -> None:
    with suppress(EOFError, OSError):
        ended.recv_bytes()  # nothing is ever sent: it returns when the other end closes
    os._exit(1)
