"""The sidecar index of a shard: what is in it and where. The only file that knows the format.

Beside `000000.tar` lies `000000.tar.index.jsonl`, UTF-8, one JSON value per line:

    {"format": 2, "shard_bytes": 1234567, "layout": "5f0c…", "samples": 1000, "fault": ""}
    ["KEY", ["webp", 512, 1893], ["json", 3072, 120]]
    …

The first line is the header: the shard's size, a checksum of its layout (BLAKE2b-128 of the 512-byte tar header in
front of each member), the number of samples below, and what is wrong with the tar behind them (`truncated`,
`broken_tar`, `trailing_data`; empty: nothing). Every other line is a sample, in the tar's order: its key, and of each
member the extension, the offset of its bytes from the start of the tar, and their number.

A sidecar is stale where the shard has another size. Where the shard is the younger of the two files (it may have been
replaced, or just copied), the layout is read again and decides. A stale sidecar is ignored with a warning.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diptych.errors import DataError
from diptych.runfolder import write_text

log = logging.getLogger(__name__)
_FORMAT = 2
SUFFIX = ".index.jsonl"
"""What a shard's name is followed by in its sidecar's."""
_BLOCK = 512
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
    samples: tuple[IndexedSample, ...]
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
        OSError: the file cannot be read.
    """
    size = shard.stat().st_size
    found: list[tuple[str, list[Member]]] = []
    with shard.open("rb") as file:
        fault, entries = _read_headers(file, size)
        for name, member in entries:
            key, extension = name
            if not found or found[-1][0] != key or any(extension == known.extension for known in found[-1][1]):
                found.append((key, []))
            found[-1][1].append(Member(extension, *member))
        if fault == "truncated" and found:
            found.pop()  # its other members may be what was cut off
        samples = tuple(IndexedSample(key, tuple(members)) for key, members in found)
        return ShardIndex(size, _layout(file.fileno(), samples), samples, fault)


_Entry = tuple[tuple[str, str], tuple[int, int]]


def _read_headers(file: Any, size: int) -> tuple[str, list[_Entry]]:
    """What is wrong with the tar, and ((key, extension), (offset, size)) of each whole member."""
    entries: list[_Entry] = []
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.offset_data < end or entry.size < 0:  # would be read for ever
                    return "broken_tar", entries
                content = 0 if not entry.isreg() else entry.size
                end = entry.offset_data + -(-content // _BLOCK) * _BLOCK
                if entry.offset_data + content > size:
                    return "truncated", entries
                # Names need not be UTF-8, but everything that shows a key does.
                name = split_name(entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
                if name is not None and entry.isreg() and not entry.issparse():
                    entries.append((name, (entry.offset_data, content)))
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        return "truncated" if "unexpected end of data" in str(error) else "broken_tar", entries
    return _ending(file, end, size), entries


def _ending(file: Any, end: int, size: int) -> str:
    """A tar ends with blocks of zeros: none, and the rest is missing; anything else behind them is out of reach."""
    if size < end + _BLOCK:
        return "truncated"
    file.seek(end)
    if file.read(_BLOCK).strip(b"\0"):  # tarfile takes a header whose checksum is wrong for the end
        return "broken_tar"
    while rest := file.read(1 << 20):
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
    header = {
        "format": _FORMAT,
        "shard_bytes": index.shard_bytes,
        "layout": index.layout,
        "samples": len(index.samples),
        "fault": index.fault,
    }
    lines = [header, *([sample.key, *sample.members] for sample in index.samples)]
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    write_text(sidecar(shard), text)


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
    except OSError:
        return index  # the shard is not there or cannot be read: its sidecar is all that is known of it
    if not fresh:
        log.warning("stale index ignored: %s; %s", sidecar(shard), _ADVICE)
    return index if fresh else None


def load(path: Path) -> ShardIndex | None:
    """A sidecar file as it stands, whether or not it fits its shard; None where there is none or a damaged one."""
    try:
        header_line, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        header = _parse_header(header_line)
        rows = json.loads(f"[{','.join(lines)}]")
        samples = tuple(_parse_sample(*row) for row in rows)
        if len(samples) != header.samples:
            raise ValueError(f"{len(samples)} samples of {header.samples}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        log.warning("unreadable index ignored: %s (%s); %s", path, error, _ADVICE)
        return None
    return ShardIndex(header.shard_bytes, header.layout, samples, header.fault)


def read_header(shard: Path) -> Header | None:
    """The sidecar's first line alone: what counting needs. None where that line cannot be trusted without the rest."""
    try:
        with sidecar(shard).open(encoding="utf-8") as file:
            header = _parse_header(file.readline())
            index_time = os.fstat(file.fileno()).st_mtime_ns
        status = shard.stat()
        return header if header.shard_bytes == status.st_size and status.st_mtime_ns <= index_time else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _parse_sample(key: str, *members: list[Any]) -> IndexedSample:
    parsed = tuple(Member(str(extension), int(offset), int(size)) for extension, offset, size in members)
    if not parsed or any(member.offset < _BLOCK or member.size < 0 for member in parsed):
        raise ValueError(f"sample {key!r} has impossible members")
    return IndexedSample(str(key), parsed)


def count(shard: Path) -> int:
    """Places in the order that a local shard takes: from its sidecar's header, else by reading the tar.

    Raises:
        OSError: there is no sidecar, and the file cannot be read.
    """
    known = read_header(shard) or read(shard)
    return (known if known is not None else scan(shard)).num_entries


def _parse_header(line: str) -> Header:
    document = json.loads(line)
    if document["format"] != _FORMAT:
        raise ValueError(f"format {document['format']}, this version reads {_FORMAT}")
    return Header(document["shard_bytes"], document["layout"], document["samples"], document["fault"])


def require_intact(index: ShardIndex, shard: Path) -> ShardIndex:
    """The index itself. Raises DataError where the tar is damaged."""
    if index.fault:
        raise DataError(
            f"not an intact tar file ({index.fault} after {len(index.samples)} samples) · {shard} · write it again"
        )
    return index
