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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diptych.config import Config
from diptych.data.transfers import Ended, Line, Piece, Source, choose, shown
from diptych.errors import DataError, DiptychError

log = logging.getLogger(__name__)
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
    ends = r"\?|#|::" if url.startswith(("http://", "https://")) else r"\?|::"
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
    source = choose(url, config.timeout_seconds)
    try:
        with target.open("wb") as file:
            _fill(file, source, url, config, stop if stop is not None else threading.Event())
    except OSError as error:  # our disk: what the transfer meets is Unreachable
        raise DataError(
            f"no room for copies of shards ({error.strerror or error}) · {target.parent} · "
            "free space, or set data.remote.scratch"
        ) from error


def _fill(file: BinaryIO, source: Source, url: str, config: RemoteConfig, stop: threading.Event) -> None:
    for attempt in range(1, config.attempts + 1):
        if stop.is_set():
            raise Unreachable("stopped")
        error = _try(file, source, config.timeout_seconds, stop)
        if error is None:
            return
        if isinstance(error, DiptychError):
            raise error
        if _is_final(error) or attempt == config.attempts:
            raise Unreachable(shown(f"{type(error).__name__}: {error}")) from error
        pause = min(config.backoff_seconds * 2.0 ** min(attempt - 1, 60), _LONGEST_PAUSE_SECONDS)
        log.warning("%s · try %d of %d, next in %g s · %s", shown(error), attempt, config.attempts, pause, shown(url))
        stop.wait(pause)
    raise Unreachable("stopped")


def _try(file: BinaryIO, source: Source, timeout: float, stop: threading.Event) -> Exception | None:
    """What broke the transfer off, None where it is complete. Errors of `file` are raised."""
    line = Line(source, file.tell())
    try:
        pace = _Pace(timeout)
        while not stop.is_set():
            item = line.next(_TICK_SECONDS)
            if isinstance(item, Ended):
                return item.error
            if item is not None:
                _write(file, item)
            if item is not None and not item.data:
                pace = _Pace(timeout)  # the opening had its own time
            elif pace.is_broken(len(item.data) if item is not None else 0):
                return TimeoutError(f"stalled: less than a kilobyte in {timeout:g} s, after {file.tell()} bytes")
        raise Unreachable("stopped")
    finally:
        line.leave()


def _write(file: BinaryIO, piece: Piece) -> None:
    if piece.offset != file.tell():
        file.seek(piece.offset)
        file.truncate()
    file.write(piece.data)
    file.flush()


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
