"""The ways to the bytes of a shard that is no local file: http(s), fsspec's file systems, commands.

Each way is a `Source`: called with what is there already, it yields pieces of the shard, and raises where the shard
came to no end. A source runs in the thread of a `Line`. That thread may hang in a library that knows no time limit;
then it is left behind. It never touches the copy.
"""

import contextlib
import http.client
import os
import queue
import re
import signal
import socket
import string
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator
from email.message import Message
from functools import partial
from typing import Any, NamedTuple

from diptych.errors import DataError

_PIECE = 1 << 18
_LARGEST_READ = 1 << 23
_PIECES_AHEAD = 2
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_SIGPIPE_STATUS = 128 + signal.SIGPIPE
# What file systems tell of a file that changes when the file does; a time of access would not do.
_MARKS = ("size", "etag", "ETag", "mtime", "LastModified", "last_modified", "created", "generation", "md5Hash")


class Piece(NamedTuple):
    """Bytes of a shard. The first of a source is empty: it says that the line stands, and where the bytes go on."""

    offset: int
    data: bytes


class Ended(NamedTuple):
    """The end of a line: None where the shard is complete."""

    error: Exception | None


Source = Callable[[int, "Line"], Generator[Piece]]


class Line:
    """One try of a source, in a thread of its own.

    Args:
        have: bytes that are there; the source may begin again from zero.
    """

    def __init__(self, source: Source, have: int) -> None:
        self._items: queue.SimpleQueue[Piece | Ended] = queue.SimpleQueue()
        self._room = threading.Semaphore(_PIECES_AHEAD)
        self._lock = threading.Lock()
        self._is_left = False
        self._ends: list[Callable[[], None]] = []
        threading.Thread(target=self._run, args=(source, have), name="diptych-line", daemon=True).start()

    def next(self, seconds: float) -> Piece | Ended | None:
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

    def _run(self, source: Source, have: int) -> None:
        error: Exception | None = None
        try:
            with contextlib.closing(source(have, self)) as pieces:
                for piece in pieces:
                    self._room.acquire()
                    if self._is_left:
                        return
                    self._items.put(piece)
        except Exception as failure:  # what libraries make of hostile answers has no common base
            error = failure
        self._items.put(Ended(error))


def shown(text: object) -> str:
    """A text from outside with what a terminal would obey escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def choose(url: str, timeout: float) -> Source:
    """The source for an address.

    Raises:
        DataError: no installed package knows this kind of address.
    """
    if url.startswith(("http://", "https://")):
        return Http(url, timeout)
    if url.startswith("pipe:"):
        return partial(_command, url)
    scheme = url.partition("://")[0]
    if _knows(scheme):
        return FileSystem(url, timeout)
    from webdataset.gopen import gopen_schemes  # imports torch

    if scheme not in gopen_schemes or scheme == "hf":  # webdataset opens hf with the package that fsspec misses
        raise DataError(
            f"no installed package opens {shown(scheme)}:// · {shown(url)} · pip install fsspec and its package for "
            f"{shown(scheme)}"
        )
    return partial(_command, url)


# --- http --------------------------------------------------------------------------------------------------------


class Http:
    """A shard behind http(s). Goes on by a range request, where server and file are still what they were."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout = urllib.parse.quote(url, safe=string.punctuation), timeout
        self._version: tuple[str | None, str | None] = (None, None)
        self._total: int | None = None

    def __call__(self, have: int, line: Line) -> Generator[Piece]:
        """The pieces from `have`, or from zero."""
        with self._open(have, line) as response:
            at = self._start(response, have)
            if at is None:
                response.close()
                yield from self(0, line)
                return
            yield Piece(at, b"")
            while data := response.read1(_PIECE):
                yield Piece(at, data)
                at += len(data)
        if self._total is not None and at != self._total:
            raise OSError(f"connection ended after {at} of {self._total} bytes")

    def _open(self, have: int, line: Line) -> http.client.HTTPResponse:
        request = urllib.request.Request(self._url, headers=self._range(have) if have else {})
        try:
            response: http.client.HTTPResponse = urllib.request.build_opener(_Noting(line)).open(
                request, timeout=self._timeout
            )
        except urllib.error.HTTPError as error:
            error.close()
            if have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                return self._open(0, line)
            raise
        return response

    def _range(self, have: int) -> dict[str, str]:
        etag, modified = self._version
        headers = {"Range": f"bytes={have}-"}
        if etag and _STRONG_ETAG.fullmatch(etag):
            headers["If-Range"] = etag
        elif modified and modified.isascii() and modified.isprintable():
            headers["If-Range"] = modified
        return headers

    def _start(self, response: http.client.HTTPResponse, have: int) -> int | None:
        """Where the bytes of the response go; None where they do not go on with what is there."""
        headers = response.headers
        version = (headers.get("ETag"), headers.get("Last-Modified"))
        if response.status != http.client.PARTIAL_CONTENT:
            self._version, self._total = version, _length(headers)
            return 0
        if not have:
            raise OSError("the server sent a range that was not asked for")
        found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if found is None or int(found[1]) != have or _differ(version, self._version):
            return None
        total = None if found[2] == "*" else int(found[2])
        if _differ((total,), (self._total,)):
            return None
        self._total = total if self._total is None else self._total
        return have


def _differ(ours: tuple[object, ...], theirs: tuple[object, ...]) -> bool:
    """Whether something that both know is not the same."""
    return any(a is not None and b is not None and a != b for a, b in zip(ours, theirs, strict=True))


def _length(headers: Message) -> int | None:
    text = headers.get("Content-Length")
    if text is None or headers.get("Transfer-Encoding") is not None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"the server sent Content-Length {text!r}")
    return int(text)


class _Noting(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections whose sockets are shut down when the line is left: a time limit per read ends no trickle."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Plain, req, line=self._line)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Secure, req, line=self._line)


class _Plain(http.client.HTTPConnection):
    def __init__(self, host: str, *, timeout: float, line: Line) -> None:
        super().__init__(host, timeout=timeout)
        self._line = line

    def connect(self) -> None:
        super().connect()
        self._line.on_leave(partial(_shut, self.sock))


class _Secure(http.client.HTTPSConnection):
    def __init__(self, host: str, *, timeout: float, line: Line) -> None:
        super().__init__(host, timeout=timeout)
        self._line = line

    def connect(self) -> None:
        super().connect()
        self._line.on_leave(partial(_shut, self.sock))


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # past the encryption, which the other thread is using


# --- commands ----------------------------------------------------------------------------------------------------


def _command(url: str, _: int, line: Line) -> Generator[Piece]:
    """The output of a command, always from its beginning; its exit code tells whether that was all."""
    process, accepted = _started(url)
    line.on_leave(partial(_kill, process))
    with process:
        assert process.stdout is not None
        at = 0
        yield Piece(at, b"")
        while data := os.read(process.stdout.fileno(), _PIECE):
            yield Piece(at, data)
            at += len(data)
        status = process.wait()
    if status not in accepted:
        raise OSError(f"the command ended with exit code {status} after {at} bytes")


def _started(url: str) -> tuple["subprocess.Popen[bytes]", list[int]]:
    """The process and the exit codes that are no failure."""
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        return process, [0, _SIGPIPE_STATUS]  # as webdataset has it: `head` may end a pipeline early
    from webdataset.gopen import Pipe, gopen

    opened = gopen(url)
    if not isinstance(opened, Pipe):
        raise DataError(
            f"webdataset opens this address in an unknown way ({type(opened).__name__}) · {shown(url)} · use pipe:"
        )
    opened.ignore_errors = True  # the caller looks at the exit code
    return opened.proc, opened.ignore_status


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends a command and, where it leads a group, its children."""
    with contextlib.suppress(OSError):
        if process.returncode is not None:  # its number may be another's by now
            return
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


# --- fsspec ------------------------------------------------------------------------------------------------------


def _knows(scheme: str) -> bool:
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
        self._url, self._timeout = url, timeout
        self._version: tuple[str, ...] = ()
        self._tries = 0

    def __call__(self, have: int, line: Line) -> Generator[Piece]:
        """The pieces from `have`, or from zero."""
        from fsspec.core import url_to_fs

        # What one request brings is seen only when all of it is there: a slow line needs small ones.
        size = max(_PIECE >> 4 * self._tries, 1 << 10)
        system, path = url_to_fs(self._url, skip_instance_cache=self._tries > 0)  # the one that failed may be broken
        self._tries += 1
        about = system.info(path)
        version = tuple(str(about.get(mark)) for mark in _MARKS)
        at = have if version == self._version else 0
        self._version = version
        with system.open(path, "rb", block_size=size) as file:
            file.seek(at)
            yield Piece(at, b"")
            begun = time.monotonic()
            while data := file.read(size):
                took = time.monotonic() - begun
                size = _next_size(size, took / self._timeout)
                yield Piece(at, data)
                at += len(data)
                begun = time.monotonic()
        if isinstance(total := about.get("size"), int) and at < total:
            raise OSError(f"file ended after {at} of {total} bytes")


def _next_size(size: int, share: float) -> int:
    """Bytes of the next request, after one that took this share of the time limit."""
    if share < 1 / 30:
        return min(2 * size, _LARGEST_READ)
    return max(size // 2, 1 << 10) if share > 1 / 4 else size
