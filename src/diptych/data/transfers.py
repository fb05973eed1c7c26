"""How the bytes of a shard come in: a line that can be left behind; the output of commands; fsspec's file systems.

Each way to a shard is a `Source`: it yields what it opened, then the bytes, and raises where the shard came to no end.
It runs in the thread of a `Line`. That thread may hang in a library that knows no time limit; then it is left behind.
It never touches the copy, and nothing that outlasts a try hears from it any more.
"""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import NamedTuple

from diptych.errors import DataError

PIECE = 1 << 18
_LARGEST_READ = 1 << 22
_PIECES_AHEAD = 2
_SIGPIPE_STATUS = 128 + signal.SIGPIPE
# What file systems tell of a file that changes when the file does; a time of access would not do.
_MARKS = ("size", "etag", "ETag", "mtime", "LastModified", "last_modified", "created", "generation", "md5Hash")


class Opened(NamedTuple):
    """The line stands: which bytes come, and where they belong."""

    offset: int
    version: tuple[str | None, ...] = ()
    """What changes when the shard does."""
    total: int | None = None
    """Bytes of the shard, where that is known."""


class Ended(NamedTuple):
    """The end of a line: None where the shard is complete."""

    error: Exception | None


Source = Callable[["Line"], Generator[Opened | bytes]]


class Line:
    """One try of a source, in a thread of its own.

    Args:
        have: bytes that are there; the source may begin again from zero.
        before: what the line was that brought them.
    """

    def __init__(self, source: Source, have: int = 0, before: Opened | None = None) -> None:
        self.have, self.before = have, before if before is not None else Opened(0)
        self._items: queue.SimpleQueue[Opened | bytes | Ended] = queue.SimpleQueue()
        self._room = threading.Semaphore(_PIECES_AHEAD)
        self._lock = threading.Lock()
        self._is_left = False
        self._ends: list[Callable[[], None]] = []
        threading.Thread(target=self._run, args=(source,), name="diptych-line", daemon=True).start()

    def next(self, seconds: float) -> Opened | bytes | Ended | None:
        """What comes within the time, None where nothing does."""
        try:
            item = self._items.get(timeout=seconds)
        except queue.Empty:
            return None
        self._room.release()
        return item

    def leave(self) -> None:
        """Ends the try, wherever it hangs."""
        with self._lock:
            self._is_left = True
        for end in self._ends:
            end()
        self._room.release()

    def on_leave(self, end: Callable[[], None]) -> None:
        """For sources: what wakes this thread when the line is left. Called at once where it has been."""
        with self._lock:
            is_left = self._is_left
            self._ends.append(end)
        if is_left:
            end()

    def _run(self, source: Source) -> None:
        error: Exception | None = None
        try:
            with contextlib.closing(source(self)) as items:
                for item in items:
                    self._room.acquire()
                    if self._is_left:
                        return
                    self._items.put(item)
        except Exception as failure:  # what libraries make of hostile answers has no common base
            error = failure
        self._items.put(Ended(error))


def shown(text: object) -> str:
    """A text from outside with what a terminal would obey escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def command(url: str, line: Line) -> Generator[Opened | bytes]:
    """The output of a command, always from its beginning; its exit code tells whether that was all."""
    with _running(url) as (process, accepted):
        line.on_leave(partial(_kill, process))
        assert process.stdout is not None
        at = 0
        yield Opened(at)
        while data := os.read(process.stdout.fileno(), PIECE):
            yield data
            at += len(data)
        status = process.wait()
    if status not in accepted:
        raise OSError(f"the command ended with exit code {status} after {at} bytes")


@contextlib.contextmanager
def _running(url: str) -> Iterator[tuple["subprocess.Popen[bytes]", list[int]]]:
    """The process and the exit codes that are no failure."""
    if url.startswith("pipe:"):
        with subprocess.Popen(
            url.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a group of its own, so that its children end with it
        ) as process:
            yield process, [0, _SIGPIPE_STATUS]  # as webdataset has it: `head` may end a pipeline early
        return
    from webdataset.gopen import Pipe, gopen

    with gopen(url) as opened:
        if not isinstance(opened, Pipe):
            raise DataError(
                f"webdataset opens this address in an unknown way ({type(opened).__name__}) · {shown(url)} · use pipe:"
            )
        opened.ignore_errors = True  # the caller looks at the exit code
        yield opened.proc, opened.ignore_status


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends a command and, where it leads a group, its children."""
    with contextlib.suppress(OSError):
        if process.returncode is not None:  # its number may be another's by now
            return
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def knows(scheme: str) -> bool:
    """Whether fsspec and the package for `scheme` are installed."""
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        return False
    return True


class FileSystem:
    """A shard that fsspec opens. Goes on where it broke off, if the file is still the same."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout, self._tries = url, timeout, 0

    def __call__(self, line: Line) -> Generator[Opened | bytes]:
        """The file from where the line broke off, or from zero."""
        from fsspec.core import url_to_fs

        # What one request brings is seen only when all of it is there: a slow line needs small ones.
        size = max(PIECE >> 4 * self._tries, 1 << 10)
        system, path = url_to_fs(self._url, skip_instance_cache=self._tries > 0)  # the one that failed may be broken
        self._tries += 1
        about = system.info(path)
        total = about["size"] if isinstance(about.get("size"), int) else None
        version = tuple(str(about.get(mark)) for mark in _MARKS)
        at = line.have if version == line.before.version else 0
        with system.open(path, "rb", block_size=size) as file:
            file.seek(at)
            yield Opened(at, version, total)
            begun = time.monotonic()
            while data := file.read(size):
                size = _next_size(size, (time.monotonic() - begun) / self._timeout)
                yield data
                at += len(data)
                begun = time.monotonic()
        if total is not None and at < total:
            raise OSError(f"file ended after {at} of {total} bytes")


def _next_size(size: int, share: float) -> int:
    """Bytes of the next request, after one that took this share of the time limit."""
    if share < 1 / 30:
        return min(2 * size, _LARGEST_READ)
    return max(size // 2, 1 << 10) if share > 1 / 4 else size
