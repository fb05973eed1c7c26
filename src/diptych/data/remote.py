"""Copies of shards that are not local files: http(s), everything fsspec knows (s3, gs, ...), commands (`pipe:`).

A transfer that stops, stalls or comes short is taken up again where it broke off (http, fsspec) or from its beginning
(commands, and where the file has been replaced), after a pause that doubles each time.
"""

import ftplib
import http.client
import logging
import math
import re
import threading
import time
import urllib.error
import zipfile
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from diptych.config import Config
from diptych.data.http_transfer import Http
from diptych.data.transfers import Ended, FileSystem, Line, Opened, Source, command, knows, shown
from diptych.errors import DataError, DiptychError

T = TypeVar("T")
log = logging.getLogger(__name__)
_HTTP = ("http://", "https://")
_TICK_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 60.0
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    ImportError,
    NotImplementedError,
    http.client.InvalidURL,
    ftplib.error_perm,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class RemoteConfig(Config):
    """How shards that are no local files are fetched."""

    attempts: int = 6
    """Tries for one shard, before it is counted as `unreachable_shard`."""
    timeout_seconds: float = 30.0
    """A transfer that does not begin, or brings less than a kilobyte, in this time counts as broken."""
    backoff_seconds: float = 1.0
    """Pause after the first failed try; doubled after each further one, at most a minute."""
    scratch: Path | None = None
    """Folder for the copies (a window's shards per lane); none: the system's folder for temporary files."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError("attempts must be at least 1")
        if not math.isfinite(self.timeout_seconds) or self.timeout_seconds <= 0:
            raise ValueError("timeout_seconds must be positive and finite")
        if not math.isfinite(self.backoff_seconds) or self.backoff_seconds < 0:
            raise ValueError("backoff_seconds must be finite and not negative")


class Unreachable(Exception):
    """A shard that cannot be fetched; more tries would not help, or have not."""


def is_remote(shard: str) -> bool:
    """Whether a shard is something else than a path."""
    return "://" in shard or shard.startswith("pipe:")


def sidecar_url(url: str, suffix: str) -> str | None:
    """The address of the file beside a remote shard, its suffix before any query; None: a command has none."""
    if url.startswith("pipe:"):
        return None
    # `zip://inner.tar::https://outer.zip` names the inner file first. Only in http is `#` no part of a name.
    ends = r"\?|#|::" if url.startswith(_HTTP) else r"\?|::"
    end = re.search(ends, url)
    at = end.start() if end is not None else len(url)
    return url[:at] + suffix + url[at:]


def fetch(url: str, target: Path, config: RemoteConfig, stop: threading.Event | None = None) -> None:
    """Writes all bytes of `url` to `target`, with retries.

    Args:
        stop: set by another thread, it ends the transfer or the pause.

    Raises:
        Unreachable: it is not there, every try failed, or it was stopped.
        DataError: no installed package knows this kind of address, or the copy cannot be written.
    """
    stop = stop if stop is not None else threading.Event()
    source = _source(url, config.timeout_seconds)
    try:
        with target.open("wb") as file:
            _retried(_Copy(file, source, config.timeout_seconds, stop), url, config, stop)
    except OSError as error:  # our disk: what the transfer meets is Unreachable
        raise DataError(
            f"no room for copies of shards ({error.strerror or error}) · {target.parent} · "
            "free space, or set data.remote.scratch"
        ) from error


def size(url: str, config: RemoteConfig, stop: threading.Event | None = None) -> int | None:
    """Bytes of `url`, None where they are known only when all are there (commands). Raises as `fetch` does."""
    if _is_command(url):
        return None
    stop = stop if stop is not None else threading.Event()
    source = _source(url, config.timeout_seconds)
    return _retried(partial(_total, source, config.timeout_seconds, stop), url, config, stop)


def _source(url: str, timeout: float) -> Source:
    if _is_command(url):
        return partial(command, url)
    return Http(url, timeout) if url.startswith(_HTTP) else FileSystem(url, timeout)


def _is_command(url: str) -> bool:
    """Whether webdataset opens it by running a command, and fsspec does not know it. Raises DataError."""
    scheme = url.partition("://")[0]
    if url.startswith("pipe:"):
        return True
    if url.startswith(_HTTP) or knows(scheme):
        return False
    from webdataset.gopen import gopen_schemes  # imports torch

    if scheme not in gopen_schemes or scheme == "hf":  # webdataset opens hf with the package that fsspec misses
        raise DataError(
            f"no installed package opens {shown(scheme)}:// · {shown(url)} · pip install fsspec and its package for "
            f"{shown(scheme)}"
        )
    return True


class _Broken(Exception):
    """A try that failed: `error` says why. It sets the errors of the line apart from those of our disk."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _retried(attempt: Callable[[], T], url: str, config: RemoteConfig, stop: threading.Event) -> T:
    for number in range(1, config.attempts + 1):
        if stop.is_set():
            break
        try:
            return attempt()
        except _Broken as broken:
            error = broken.error
        if isinstance(error, DiptychError):
            raise error
        if _is_final(error) or number == config.attempts:
            raise Unreachable(shown(f"{type(error).__name__}: {error}")) from error
        pause = min(config.backoff_seconds * 2.0 ** min(number - 1, 60), _LONGEST_PAUSE_SECONDS)
        log.warning("%s · try %d of %d, next in %g s · %s", shown(error), number, config.attempts, pause, shown(url))
        stop.wait(pause)
    raise Unreachable("stopped")


class _Copy:
    """Brings the rest of a shard into a file, once per call."""

    def __init__(self, file: BinaryIO, source: Source, timeout: float, stop: threading.Event) -> None:
        self._file, self._source, self._timeout, self._stop = file, source, timeout, stop
        self._before: Opened | None = None

    def __call__(self) -> None:
        line = Line(self._source, self._file.tell(), self._before)
        with closing(_items(line, self._timeout, self._stop)) as items:
            for item in items:
                if isinstance(item, Opened):
                    self._before = item
                    if item.offset != self._file.tell():
                        self._file.seek(item.offset)
                        self._file.truncate()
                else:
                    self._file.write(item)
                    self._file.flush()


def _total(source: Source, timeout: float, stop: threading.Event) -> int | None:
    with closing(_items(Line(source), timeout, stop)) as items:
        first = next(items)
    return first.total if isinstance(first, Opened) else None


def _items(line: Line, timeout: float, stop: threading.Event) -> Generator[Opened | bytes]:
    """What comes over the line, which is left at the end. Raises _Broken, and Unreachable when stopped."""
    try:
        pace = _Pace(timeout)
        while not stop.is_set():
            item = line.next(_TICK_SECONDS)
            if isinstance(item, Ended):
                if item.error is not None:
                    raise _Broken(item.error)
                return
            if item is not None:
                yield item
            if isinstance(item, Opened):
                pace = _Pace(timeout)  # the opening had its own time
            elif pace.is_broken(len(item) if item is not None else 0):
                raise _Broken(TimeoutError(f"stalled: less than a kilobyte in {timeout:g} s"))
        raise Unreachable("stopped")
    finally:
        line.leave()


def _is_final(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 425, 429)
    return isinstance(error, _FINAL)


class _Pace:
    """Tells when a transfer brings next to nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since, self._bytes = seconds, time.monotonic(), 0

    def is_broken(self, size: int) -> bool:
        """Notes `size` further bytes; whether the last stretch of time brought less than a kilobyte."""
        self._bytes += size
        if (now := time.monotonic()) - self._since < self._seconds:
            return False
        is_broken = self._bytes < 1024
        self._since, self._bytes = now, 0
        return is_broken
