"""Copies of shards that are not local files: http(s), everything fsspec knows (s3, gs, ...), commands (`pipe:`).

A transfer that stops, stalls or comes short is taken up again where it broke off (http, fsspec) or from its beginning
(commands), after a pause that doubles each time.
"""

import http.client
import logging
import os
import select
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from diptych.config import Config
from diptych.errors import DataError

if TYPE_CHECKING:
    from webdataset.gopen import Pipe

log = logging.getLogger(__name__)
_PIECE = 1 << 18


@dataclass(frozen=True)
class RemoteConfig(Config):
    """How shards that are no local files are fetched."""

    attempts: int = 6
    """Tries for one shard, before it is counted as `unreachable_shard`."""
    timeout_seconds: float = 30.0
    """A connection that brings less than a kilobyte in this time counts as broken."""
    backoff_seconds: float = 1.0
    """Pause after the first failed try; doubled after each further one, at most a minute."""
    scratch: Path | None = None
    """Folder for the copies (a window's shards per lane); none: the system's folder for temporary files."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.timeout_seconds <= 0 or self.backoff_seconds < 0:
            raise ValueError("attempts must be at least 1, timeout_seconds positive, backoff_seconds not negative")


class Unreachable(Exception):
    """A shard that cannot be fetched; more tries would not help, or have not."""


def is_remote(shard: str) -> bool:
    """Whether a shard is something else than a path."""
    return "://" in shard or shard.startswith("pipe:")


def fetch(url: str, target: Path, config: RemoteConfig) -> None:
    """Writes all bytes of `url` to `target`, with retries.

    Raises:
        Unreachable: it is not there, or every try failed.
        DataError: no installed library knows this kind of address.
    """
    transfer = _http if url.startswith(("http://", "https://")) else _command if _is_command(url) else _filesystem
    with target.open("wb") as file:
        for attempt in range(1, config.attempts + 1):
            try:
                transfer(url, file, config.timeout_seconds)
                return
            except (OSError, http.client.HTTPException) as error:
                if _is_final(error) or attempt == config.attempts:
                    raise Unreachable(f"{type(error).__name__}: {error}") from error
                pause = min(config.backoff_seconds * 2 ** (attempt - 1), 60.0)
                log.warning("%s · try %d of %d, next in %g s · %s", error, attempt, config.attempts, pause, url)
                time.sleep(pause)


def _is_final(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in (408, 416, 425, 429)
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)


class _Pace:
    """Raises TimeoutError when a stream that is not silent brings next to nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since, self._bytes = seconds, time.monotonic(), 0

    def count(self, size: int) -> None:
        """Notes `size` further bytes."""
        self._bytes += size
        if (now := time.monotonic()) - self._since >= self._seconds:
            if self._bytes < 1024:
                raise TimeoutError(f"stalled: {self._bytes} bytes in {self._seconds:g} s")
            self._since, self._bytes = now, 0


def _http(url: str, file: BinaryIO, timeout: float) -> None:
    """Appends what is missing, by a range request where the server grants it; else begins again."""
    have = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing lies behind what we have, or the file has changed: begin again
            file.seek(0)
            file.truncate()
        raise
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            file.seek(0)
            file.truncate()
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError("the server sent another range than was asked for")
        expected = response.headers.get("Content-Length")
        got = 0
        pace = _Pace(timeout)
        while piece := response.read1(_PIECE):
            file.write(piece)
            got += len(piece)
            pace.count(len(piece))
        if expected is not None and got < int(expected):
            raise OSError(f"connection ended after {got} of {expected} bytes")


def _is_command(url: str) -> bool:
    """What webdataset opens by running a command, and fsspec does not know."""
    if url.startswith("pipe:"):
        return True
    from webdataset.gopen import gopen_schemes  # imports torch

    scheme = url.partition("://")[0]
    return scheme in gopen_schemes and not _knows(scheme)


def _command(url: str, file: BinaryIO, timeout: float) -> None:
    """The output of the command; its exit code tells whether that was all."""
    from webdataset.gopen import Pipe, gopen

    file.seek(0)
    file.truncate()
    with gopen(url) as stream:
        if not isinstance(stream, Pipe):
            raise DataError(f"webdataset opens this address in an unknown way ({type(stream).__name__}) · {url}")
        try:
            for piece in _output(stream, timeout):
                file.write(piece)
        except TimeoutError:
            stream.ignore_errors = True  # its exit code is our doing
            stream.proc.kill()
            raise


def _output(stream: "Pipe", timeout: float) -> Iterator[bytes]:
    descriptor = stream.stream.fileno()
    pace = _Pace(timeout)
    while True:
        ready, _, _ = select.select([descriptor], [], [], timeout)
        if not ready:
            raise TimeoutError(f"stalled: no bytes in {timeout:g} s")
        piece = os.read(descriptor, _PIECE)
        if not piece:
            return
        pace.count(len(piece))
        yield piece


def _knows(scheme: str) -> bool:
    """Whether fsspec and the package for `scheme` are installed."""
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        return False
    return True


def _filesystem(url: str, file: BinaryIO, timeout: float) -> None:
    """Appends what is missing, read through fsspec."""
    scheme = url.partition("://")[0]
    if not _knows(scheme):
        raise DataError(
            f"no installed package opens {scheme}:// · {url} · pip install fsspec and its package for {scheme}"
        )
    import fsspec

    with fsspec.open(url, "rb") as source:
        source.seek(file.tell())
        pace = _Pace(timeout)
        while piece := source.read(_PIECE):
            file.write(piece)
            pace.count(len(piece))
