"""The sidecar index of a shard: what is in it and where. The only file that knows the format.

Beside `000000.tar` lies `000000.tar.index.jsonl`, UTF-8, one JSON value per line:

    {"format": 2, "shard_bytes": 1234567, "layout": "5f0c…", "lines": "91ab…", "samples": 1000, "fault": ""}
    ["KEY", ["webp", 512, 1893], ["json", 3072, 120]]
    …

The first line is the header: the shard's size, a checksum of its layout (BLAKE2b-128 of the 512-byte tar header in
front of each member), one of the lines below, the number of samples in them, and what is wrong with the tar behind them
(`truncated`, `broken_tar`, `trailing_data`; empty: nothing). Every other line is a sample, in the tar's order: its key,
and of each member the extension, the offset of its bytes from the start of the tar, and their number.

A sidecar is stale where the shard has another size. Where the shard is the younger of the two files (it may have been
replaced, or just copied), the layout is read again and decides. A stale sidecar is ignored with a warning.
"""

import hashlib
import json
import logging
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

from diptych.runfolder import write_text

log = logging.getLogger(__name__)
_FORMAT = 2
SUFFIX = ".index.jsonl"
"""What a shard's name is followed by in its sidecar's."""
_BLOCK = 512
_FAULTS = ("", "truncated", "broken_tar", "trailing_data")
_MAX_NAME = 1 << 16
"""Bytes that extended headers may take: names of gigabytes are an attack, and Python reads digits in quadratic time."""
_ADVICE = "`diptych data index` writes it again"


class Member(NamedTuple):
    """One file of a sample."""

    extension: str
    """Lower case, without its first dot."""
    offset: int
    """Bytes from the start of the tar to the content."""
    size: int
    """Bytes of content."""


class IndexedSample(NamedTuple):
    """One sample of a shard."""

    key: str
    members: tuple[Member, ...]
    """In the tar's order; no extension twice."""


@dataclass(frozen=True)
class ShardIndex:
    """Everything in one shard, in order."""

    shard_bytes: int
    layout: str
    """Checksum of the tar headers, hexadecimal."""
    samples: Sequence[IndexedSample]
    """Those of a sidecar are parsed when they are asked for, and raise ValueError where they make no sense."""
    fault: str = ""
    """Why the tar ends before its time: `truncated`, `broken_tar`, `trailing_data`; empty for an intact one."""

    @property
    def num_entries(self) -> int:
        """Places in the order that the shard takes: its samples, and one for its fault."""
        return len(self.samples) + bool(self.fault)


@dataclass(frozen=True)
class Header:
    """The first line of a sidecar."""

    shard_bytes: int
    layout: str
    lines: str
    samples: int
    fault: str

    @property
    def num_entries(self) -> int:
        """Places in the order that the shard takes: its samples, and one for its fault."""
        return self.samples + bool(self.fault)


def sidecar(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_name(shard.name + SUFFIX)


_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


def split_name(name: str) -> tuple[str, str] | None:
    """`folder/key.tar.gz` → (`folder/key`, `tar.gz`): WebDataset's rule, the first dot of the last part divides.

    None for what belongs to no sample: hidden files, and names without an extension.
    """
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


# --- from the tar --------------------------------------------------------------------------------------------------


def scan(shard: Path) -> ShardIndex:
    """Reads a tar's headers. Damage is no error: what lies before it is listed, and `fault` names it.

    Links, devices and sparse files are passed over. An extension that comes again under its key begins a new sample.

    Raises:
        OSError: the file cannot be read, or is no file (a pipe, say).
    """
    status = shard.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"not a regular file: {shard}")
    found: list[tuple[str, list[Member]]] = []
    with shard.open("rb") as file:
        entries = _Entries(file, status.st_size)
        for key, member in entries:
            if not found or found[-1][0] != key or any(member.extension == known.extension for known in found[-1][1]):
                found.append((key, []))
            found[-1][1].append(member)
        if entries.fault == "truncated" and found:
            found.pop()  # its other members may be what was cut off
        samples = tuple(IndexedSample(key, tuple(members)) for key, members in found)
        return ShardIndex(status.st_size, _layout(file.fileno(), samples), samples, entries.fault)


class _CarefulTarInfo(tarfile.TarInfo):
    """Refuses extended headers of absurd size before they are read."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
        if self.type in (*extended, tarfile.GNUTYPE_LONGLINK) and not 0 <= self.size <= _MAX_NAME:
            raise tarfile.InvalidHeaderError(f"extended header of {self.size} bytes")  # type: ignore[attr-defined]
        return super()._proc_member(archive)  # type: ignore[misc]


class _Entries:
    """The whole regular members of a tar as (key, Member); after the last one, `fault` says what is wrong behind it."""

    def __init__(self, file: Any, size: int) -> None:
        self.fault = ""
        self._file, self._size = file, size

    def __iter__(self) -> Iterator[tuple[str, Member]]:
        end = 0
        try:
            with tarfile.open(fileobj=self._file, mode="r:", tarinfo=_CarefulTarInfo) as tar:
                while (entry := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                    if entry.offset_data < end or entry.size < 0:  # would be read for ever
                        self.fault = "broken_tar"
                        return
                    plain = entry.isreg() and not entry.issparse()
                    end = tar.offset
                    if (entry.offset_data + entry.size if plain else end) > self._size:
                        self.fault = "truncated"
                        return
                    # Names need not be UTF-8, but everything that shows a key does.
                    name = split_name(entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
                    if name is not None and plain:
                        yield name[0], Member(name[1], entry.offset_data, entry.size)
        except Exception as error:  # a reader fed with hostile bytes raises whatever it likes
            self.fault = "truncated" if "unexpected end of data" in str(error) else "broken_tar"
            return
        self.fault = self._ending(end)

    def _ending(self, end: int) -> str:
        """A tar ends with blocks of zeros: none, and the rest is missing; anything else behind them is out of reach."""
        if self._size < end + _BLOCK:
            return "truncated"
        self._file.seek(end)
        if self._file.read(_BLOCK).strip(b"\0"):  # tarfile takes a header whose checksum is wrong for the end
            return "broken_tar"
        while rest := self._file.read(1 << 20):
            if rest.strip(b"\0"):
                return "trailing_data"
        return ""


def _layout(descriptor: int, samples: Iterable[IndexedSample]) -> str:
    checksum = hashlib.blake2b(digest_size=16)
    for sample in samples:
        for member in sample.members:
            checksum.update(os.pread(descriptor, _BLOCK, member.offset - _BLOCK))
    return checksum.hexdigest()


# --- the sidecar ---------------------------------------------------------------------------------------------------


def write(shard: Path, index: ShardIndex) -> None:
    """Writes the sidecar in one step."""
    lines = "".join(_dumps([sample.key, *sample.members]) + "\n" for sample in index.samples)
    header = {
        "format": _FORMAT,
        "shard_bytes": index.shard_bytes,
        "layout": index.layout,
        "lines": _hash(lines.encode()),
        "samples": len(index.samples),
        "fault": index.fault,
    }
    write_text(sidecar(shard), f"{_dumps(header)}\n{lines}")


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class _Lines(Sequence[IndexedSample]):
    """The samples of a sidecar: a line is parsed when its sample is asked for."""

    def __init__(self, lines: list[bytes], shard_bytes: int) -> None:
        self._lines, self._shard_bytes = lines, shard_bytes

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, place: int) -> IndexedSample: ...
    @overload
    def __getitem__(self, place: slice) -> "tuple[IndexedSample, ...]": ...
    def __getitem__(self, place: int | slice) -> "IndexedSample | tuple[IndexedSample, ...]":
        if isinstance(place, slice):
            return tuple(self._parse(line) for line in self._lines[place])
        return self._parse(self._lines[place])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def _parse(self, line: bytes) -> IndexedSample:
        """Raises ValueError: no sample that could lie in this shard."""
        try:
            key, *members = json.loads(line)
            parsed = tuple(Member(str(extension), int(offset), int(size)) for extension, offset, size in members)
        except (TypeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        for member in parsed:
            if member.size < 0 or not _BLOCK <= member.offset <= self._shard_bytes - member.size:
                raise ValueError(f"member at {member.offset} of {member.size} bytes")
        if not parsed or not isinstance(key, str):
            raise ValueError(f"sample {key!r}")
        return IndexedSample(key.encode("utf-8", "replace").decode(), parsed)


def read(shard: Path) -> ShardIndex | None:
    """The sidecar's contents; None where there is none, or a stale or damaged one (with a warning)."""
    index = load(sidecar(shard))
    if index is None:
        return None
    try:
        status = shard.stat()
        fresh = index.shard_bytes == status.st_size
        if fresh and status.st_mtime_ns > sidecar(shard).stat().st_mtime_ns:
            with shard.open("rb") as file:
                fresh = _layout(file.fileno(), index.samples) == index.layout
    except ValueError:
        fresh = False
    except OSError:
        return index  # the shard is not there or cannot be read: its sidecar is all that is known of it
    if not fresh:
        log.warning("stale index ignored: %s; %s", sidecar(shard), _ADVICE)
    return index if fresh else None


def load(path: Path) -> ShardIndex | None:
    """A sidecar file as it stands, whether or not it fits its shard; None where there is none or a damaged one."""
    try:
        first, _, rest = path.read_bytes().partition(b"\n")
        header = _parse_header(first)
        lines = rest.split(b"\n")[:-1]
        if _hash(rest) != header.lines or len(lines) != header.samples:
            raise ValueError("its lines are not those that were written")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("unreadable index ignored: %s (%s); %s", path, error, _ADVICE)
        return None
    return ShardIndex(header.shard_bytes, header.layout, _Lines(lines, header.shard_bytes), header.fault)


def read_header(shard: Path) -> Header | None:
    """The sidecar's first line alone: what counting needs. None where that line cannot be trusted without the rest."""
    try:
        with sidecar(shard).open("rb") as file:
            header = _parse_header(file.readline(4096))
            index_time = os.fstat(file.fileno()).st_mtime_ns
        status = shard.stat()
        return header if header.shard_bytes == status.st_size and status.st_mtime_ns <= index_time else None
    except (OSError, ValueError):
        return None


def count(shard: Path) -> int:
    """Places in the order that a local shard takes: from its sidecar's header, else by reading the tar.

    Raises:
        OSError: there is no sidecar, and the file cannot be read.
    """
    known = read_header(shard) or read(shard)
    return (known if known is not None else scan(shard)).num_entries


def _parse_header(line: bytes) -> Header:
    """Raises ValueError: no header, or one that makes no sense."""
    try:
        document = json.loads(line)
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, this version reads {_FORMAT}")
        header = Header(**{name: document[name] for name in Header.__dataclass_fields__})
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"its first line is no header ({error})") from error
    sizes = (header.shard_bytes, header.samples)
    if header.fault not in _FAULTS or any(type(size) is not int or not 0 <= size < 1 << 62 for size in sizes):
        raise ValueError("its first line makes no sense")
    return header
