"""A shard as its readers see it: numbered entries, each read when its turn comes. Local and remote ones are alike."""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import NamedTuple

import braceexpand

from diptych.data import index, remote
from diptych.data.faults import UnusableSample
from diptych.data.index import IndexedSample, ShardIndex
from diptych.data.remote import RemoteConfig, Unreachable, is_remote
from diptych.errors import DataError

log = logging.getLogger(__name__)
_MAX_SAMPLE_BYTES = 1 << 28
_OPEN_FILES = 64
_FETCHERS = 8
_SCRATCH, _LOCK = "diptych-shards-", "lock"


class RawSample(NamedTuple):
    """One sample as it lies in the shard."""

    key: str
    members: dict[str, bytes]
    """Extension → content."""
    shard: str
    number: int
    """Its place in the shard: keys may come twice."""


def list_shards(pattern: str, *, max_missing: float = 0.0) -> tuple[str, ...]:
    """Shards in a folder (all `.tar`, sorted), of a glob, or of a brace pattern `{000000..000099}.tar`; URLs pass.

    Args:
        max_missing: share of a brace pattern's shards that may be missing; their samples are faults of the stream.

    Raises:
        DataError: there are none, or too many are missing.
    """
    path = Path(pattern)
    missing: list[str] = []
    try:
        if is_remote(pattern):
            return tuple(braceexpand.braceexpand(pattern))
        if path.is_dir():
            found = sorted(str(shard) for shard in path.glob("*.tar"))
            problem = "folder holds no .tar shards"
        elif "*" in pattern or "?" in pattern:
            root = Path(path.anchor or ".")
            found = sorted(str(shard) for shard in root.glob(str(path.relative_to(path.anchor))))
            problem = "no shard matches the pattern"
        else:
            found = list(braceexpand.braceexpand(pattern))
            missing = [shard for shard in found if not Path(shard).is_file()]
            problem = f"no such folder or shard ({missing[0]})" if missing else "pattern names no shard"
    except ValueError as error:  # braces or stars that do not fit together
        raise DataError(f"not a pattern ({error}) · {pattern} · correct it") from error
    if not found or len(missing) == len(found) or len(missing) > max_missing * len(found):
        raise DataError(f"{problem} · {pattern} · make shards with `diptych data pack`, or correct the path")
    return tuple(found)


class OpenShard:
    """One shard's entries. Built by `ShardStore.open`."""

    def __init__(self, name: str, path: Path, contents: ShardIndex, files: "_Files", *, always: str = "") -> None:
        """`always` is the fault of every entry, where the shard is out of reach and only its index is known."""
        self.name, self.path = name, path
        self._contents, self._files, self._always = contents, files, always
        self.num_entries = contents.num_entries

    def key(self, number: int) -> str:
        """The key of an entry; empty for the shard's own fault, and where it cannot be known."""
        try:
            return self._contents.samples[number].key if number < len(self._contents.samples) else ""
        except ValueError:
            return ""

    @property
    def lost(self) -> bool:
        """Whether nothing at all is known of it but its fault."""
        return not self._contents.samples and bool(self._contents.fault)

    def read(self, number: int) -> RawSample:
        """The content of an entry, one read of the file.

        Raises:
            UnusableSample: the shard's fault stands here, or the bytes cannot be read: `unreadable`, `too_large`.
        """
        if self._always:
            raise UnusableSample(self._always)
        samples = self._contents.samples
        if number >= len(samples):
            raise UnusableSample(self._contents.fault)
        try:
            sample = samples[number]
            return RawSample(sample.key, self._members(sample), self.name, number)
        except (OSError, ValueError) as error:
            raise UnusableSample("unreadable", str(error)) from error

    def _members(self, sample: IndexedSample) -> dict[str, bytes]:
        """Raises OSError, UnusableSample `too_large`."""
        first = min(member.offset for member in sample.members)
        span = max(member.offset + member.size for member in sample.members) - first
        size = max(span, sum(member.size for member in sample.members))
        if size > _MAX_SAMPLE_BYTES:
            raise UnusableSample("too_large", f"sample of {size} bytes")
        data = self._files.read(self.path, first, span)
        if len(data) < span:
            raise OSError("the shard is shorter than its index says")
        return {m.extension: data[m.offset - first : m.offset - first + m.size] for m in sample.members}


class ShardStore:
    """Opens shards; keeps the copies of remote ones as long as their entries are in use. One per reading process.

    Args:
        scratch: where copies go; None: a scratch folder of its own, as long as this object lives.
    """

    def __init__(self, config: RemoteConfig | None = None, scratch: Path | None = None) -> None:
        self._remote = config if config is not None else RemoteConfig()
        self._given = scratch
        self._files = _Files()
        self._ahead: dict[str, Future[Path]] = {}
        self._counts: dict[str, int | None] = {}
        self._stop = Event()

    def open(self, shard: str) -> OpenShard:
        """A shard's entries. One that is out of reach has the entries of its index, each at fault, or without an index
        one: `unreachable_shard`, `missing_shard`."""
        opened = self._open_remote(shard) if is_remote(shard) else self._open_local(shard)
        self._counts[shard] = opened.num_entries
        return opened

    def _open_local(self, shard: str) -> OpenShard:
        try:
            known = index.read(Path(shard))
            return OpenShard(shard, Path(shard), known if known is not None else index.scan(Path(shard)), self._files)
        except OSError as error:
            log.warning("shard left out: %s · %r", error, shard)
            return OpenShard(shard, Path(shard), ShardIndex(0, "", (), "missing_shard"), self._files)

    def _open_remote(self, shard: str) -> OpenShard:
        try:
            begun = self._ahead.pop(shard, None)
            path = begun.result() if begun is not None else self._fetch(shard)
        except Unreachable as error:
            log.warning("shard left out: %s · %r", error, shard)
            known = self._remote_index(shard) or ShardIndex(0, "", (), "unreachable_shard")
            return OpenShard(shard, Path(shard), known, self._files, always="unreachable_shard")
        opened = OpenShard(shard, path, index.scan(path), self._files)
        weakref.finalize(opened, self._files.remove, path)
        return opened

    def num_entries(self, shard: str) -> int | None:
        """Entries of a shard: from its sidecar's first line or, for a local one, its headers; None where unknown."""
        if shard not in self._counts:
            self._counts[shard] = self._count_remote(shard) if is_remote(shard) else _count(Path(shard))
        return self._counts[shard]

    def _count_remote(self, shard: str) -> int | None:
        """What `open` will find: known without copying where the sidecar beside it is of a shard of its size."""
        known = self._remote_index(shard)
        if known is None:
            return None
        try:
            size = remote.size(shard, self._remote)
        except Unreachable:
            return known.num_entries
        return known.num_entries if size == known.shard_bytes else None

    def _remote_index(self, shard: str) -> ShardIndex | None:
        """The sidecar beside a remote shard. A command has nothing beside it."""
        address = remote.sidecar_url(shard, index.SUFFIX)
        if address is None:
            return None
        try:
            copy = self._fetch(address)
        except Unreachable:
            return None
        known = index.load(copy)
        copy.unlink()
        return known

    def prepare(self, shard: str) -> None:
        """Begins to fetch a remote shard that will be opened soon."""
        if is_remote(shard) and shard not in self._ahead:
            self._ahead[shard] = self._fetchers.submit(self._fetch, shard)

    def close(self) -> None:
        """Ends what is being fetched."""
        self._stop.set()
        if "_fetchers" in vars(self):
            self._fetchers.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, address: str) -> Path:
        try:
            descriptor, name = tempfile.mkstemp(suffix=".tar", dir=self._scratch)
        except OSError as error:
            raise _no_scratch(self._scratch, error) from error
        os.close(descriptor)
        copy = Path(name)
        try:
            remote.fetch(address, copy, self._remote, self._stop)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        return copy

    @cached_property
    def _fetchers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_FETCHERS, thread_name_prefix="diptych-fetch")

    @cached_property
    def _scratch(self) -> Path:
        if self._given is not None:
            return self._given
        scratch = Scratch(self._remote)
        weakref.finalize(self, scratch.close)
        return scratch.folder


class Scratch:
    """A new folder for copies of shards. As long as one process holds its lock it is in use; folders that killed
    processes left behind, here or on another machine, can be locked and are removed."""

    def __init__(self, config: RemoteConfig) -> None:
        parent = Path(config.scratch or tempfile.gettempdir())
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for old in parent.glob(f"{_SCRATCH}*"):
                _remove_unused(old)
            self.folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
            self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        except OSError as error:
            raise _no_scratch(parent, error) from error

    def close(self) -> None:
        """Removes it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _remove_unused(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _no_scratch(folder: Path, error: OSError) -> DataError:
    return DataError(f"no copies of remote shards can be kept ({error}) · {folder} · set data.remote.scratch")


def _count(shard: Path) -> int:
    try:
        return index.count(shard)
    except OSError:
        return 1  # the fault that `open` will find


class _Files:
    """Files that are read here and there; the least recently used are closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._open)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends. Raises OSError."""
        descriptor = self._open.get(path)
        if descriptor is None:
            descriptor = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        data = os.pread(descriptor, size, offset)
        while 0 < len(data) < size:  # network file systems may give less at a time
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def remove(self, path: Path) -> None:
        """Closes and deletes a file."""
        if path in self._open:
            os.close(self._open.pop(path))
        path.unlink(missing_ok=True)


def _close_all(files: OrderedDict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def read_shard(shard: str) -> Iterator[RawSample]:
    """The readable samples of one shard, in the order they lie in it; faults are passed over with a warning."""
    store = ShardStore()
    opened = store.open(shard)
    for number in range(opened.num_entries):
        try:
            yield opened.read(number)
        except UnusableSample as fault:
            log.warning("sample left out: %s · %s %r", fault, shard, opened.key(number))
