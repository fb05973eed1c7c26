"""A shard as its readers see it: numbered entries, each read when its turn comes. Local and remote ones are alike."""

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
from typing import NamedTuple

import braceexpand
import psutil

from diptych.data import index, remote
from diptych.data.faults import UnusableSample
from diptych.data.index import IndexedSample, ShardIndex
from diptych.data.remote import RemoteConfig, Unreachable, is_remote
from diptych.errors import DataError

log = logging.getLogger(__name__)
_MAX_SAMPLE_BYTES = 1 << 28
_OPEN_FILES = 64
_SCRATCH = "diptych-shards-"


class RawSample(NamedTuple):
    """One sample as it lies in the shard."""

    key: str
    members: dict[str, bytes]
    """Extension → content."""
    shard: str


def list_shards(pattern: str, *, max_missing: float = 0.0) -> tuple[str, ...]:
    """Shards in a folder (all `.tar`, sorted), of a glob, or of a brace pattern `{000000..000099}.tar`; URLs pass.

    Args:
        max_missing: share of a brace pattern's shards that may be missing; their samples are faults of the stream.

    Raises:
        DataError: there are none, or too many are missing.
    """
    if is_remote(pattern):
        return tuple(braceexpand.braceexpand(pattern))
    path = Path(pattern)
    missing: list[str] = []
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
    if not found or len(missing) == len(found) or len(missing) > max_missing * len(found):
        raise DataError(f"{problem} · {pattern} · make shards with `diptych data pack`, or correct the path")
    return tuple(found)


class OpenShard:
    """One shard's entries. Built by `ShardStore.open`."""

    def __init__(self, name: str, path: Path, contents: ShardIndex, files: "_Files") -> None:
        self.name = name
        self.path = path
        self._contents, self._files = contents, files
        self.num_entries = contents.num_entries

    def key(self, number: int) -> str:
        """The key of an entry; empty for the shard's own fault."""
        samples = self._contents.samples
        return samples[number].key if number < len(samples) else ""

    def read(self, number: int) -> RawSample:
        """The content of an entry, one read of the file.

        Raises:
            UnusableSample: the shard's fault stands here, or the bytes cannot be read: `unreadable`, `too_large`.
        """
        samples = self._contents.samples
        if number >= len(samples):
            raise UnusableSample(self._contents.fault)
        return RawSample(samples[number].key, self._members(samples[number]), self.name)

    def _members(self, sample: IndexedSample) -> dict[str, bytes]:
        first = sample.members[0].offset
        last = max(member.offset + member.size for member in sample.members)
        if last - first > _MAX_SAMPLE_BYTES:
            raise UnusableSample("too_large", f"sample of {last - first} bytes")
        try:
            data = self._files.read(self.path, first, last - first)
        except OSError as error:
            raise UnusableSample("unreadable", str(error)) from error
        if len(data) < last - first:
            raise UnusableSample("unreadable", "the shard is shorter than its index says")
        return {m.extension: data[m.offset - first : m.offset - first + m.size] for m in sample.members}


class ShardStore:
    """Opens shards; keeps the copies of remote ones as long as their entries are in use. One per reading process.

    Args:
        scratch: where copies go; None: a folder that `scratch_folder` makes, removed with this object.
    """

    def __init__(self, config: RemoteConfig | None = None, scratch: Path | None = None) -> None:
        self._remote = config if config is not None else RemoteConfig()
        self._given = scratch
        self._files = _Files()
        self._ahead: dict[str, Future[Path]] = {}
        self._counts: dict[str, int | None] = {}

    def open(self, shard: str) -> OpenShard:
        """A shard's entries; one that cannot be read has one entry, its fault: `unreachable_shard`, `missing_shard`."""
        path = Path(shard)
        try:
            if is_remote(shard):
                path = self._copy(shard)
            known = index.read(path)
            opened = OpenShard(shard, path, known if known is not None else index.scan(path), self._files)
        except (OSError, Unreachable) as error:
            log.warning("shard left out: %s · %s", error, shard)
            fault = "unreachable_shard" if isinstance(error, Unreachable) else "missing_shard"
            opened = OpenShard(shard, path, ShardIndex(0, "", (), fault), self._files)
        if path != Path(shard):
            weakref.finalize(opened, self._files.remove, path)
        self._counts[shard] = opened.num_entries
        return opened

    def num_entries(self, shard: str) -> int | None:
        """Entries of a shard: from its sidecar's first line or, for a local one, its headers; None where unknown."""
        if shard not in self._counts:
            self._counts[shard] = self._count_remote(shard) if is_remote(shard) else _count(Path(shard))
        return self._counts[shard]

    def _count_remote(self, shard: str) -> int | None:
        """From the sidecar beside the remote shard. A command has nothing beside it."""
        if shard.startswith("pipe:"):
            return None
        target = self._scratch / "sidecar"
        try:
            remote.fetch(shard + index.SUFFIX, target, self._remote)
        except Unreachable:
            return None
        known = index.load(target)
        return known.num_entries if known is not None else None

    def prepare(self, shard: str) -> None:
        """Begins to fetch a remote shard that will be opened soon."""
        if is_remote(shard) and shard not in self._ahead:
            self._ahead[shard] = self._fetchers.submit(self._fetch, shard)

    def _copy(self, shard: str) -> Path:
        begun = self._ahead.pop(shard, None)
        return begun.result() if begun is not None else self._fetch(shard)

    def _fetch(self, shard: str) -> Path:
        descriptor, name = tempfile.mkstemp(suffix=".tar", dir=self._scratch)
        os.close(descriptor)
        copy = Path(name)
        try:
            remote.fetch(shard, copy, self._remote)
        except BaseException:
            copy.unlink()
            raise
        return copy

    @cached_property
    def _fetchers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(2, thread_name_prefix="diptych-fetch")

    @cached_property
    def _scratch(self) -> Path:
        if self._given is not None:
            return self._given
        folder = scratch_folder(self._remote)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder


def scratch_folder(config: RemoteConfig) -> Path:
    """A new folder for copies of shards; the caller removes it. Those that killed processes left behind are removed."""
    parent = Path(config.scratch or tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(f"{_SCRATCH}*"):
        owner = old.name.removeprefix(_SCRATCH).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-", dir=parent))


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
            log.warning("sample left out: %s · %s %s", fault, shard, opened.key(number))
