"""The sidecar index of a shard: what is in it and where. The only file that knows the format.

Beside `000000.tar` lies `000000.tar.index.json`:

    {"format": 1, "shard_bytes": 1234567, "samples": [["KEY", {"webp": [512, 1893], "json": [3072, 120]}], …]}

Each member is `[offset, size]` of its bytes in the tar. An index whose `shard_bytes` differs from the shard's size is
stale: it is ignored with a warning, as if it were not there.
"""

import json
import logging
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.errors import DataError
from diptych.runfolder import write_text

log = logging.getLogger(__name__)
_FORMAT = 1


@dataclass(frozen=True)
class Member:
    """One file of a sample."""

    offset: int
    """Bytes from the start of the tar to the content."""
    size: int
    """Bytes of content."""


@dataclass(frozen=True)
class IndexedSample:
    """One sample of a shard."""

    key: str
    members: dict[str, Member]
    """Extension without its first dot → where its bytes are."""


@dataclass(frozen=True)
class ShardIndex:
    """Everything in one shard, in order."""

    shard_bytes: int
    samples: tuple[IndexedSample, ...]


def sidecar(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_name(shard.name + ".index.json")


def scan(shard: Path) -> ShardIndex:
    """Reads a tar's headers.

    Raises:
        DataError: it is no intact tar file.
    """
    samples: list[IndexedSample] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for entry in tar:
                if entry.isreg():
                    key, extension = split_name(entry.name)
                    if not samples or samples[-1].key != key:
                        samples.append(IndexedSample(key, {}))
                    samples[-1].members[extension] = Member(entry.offset_data, entry.size)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"not an intact tar file ({error}) · {shard} · write the shard again") from error
    return ShardIndex(shard.stat().st_size, tuple(samples))


def split_name(name: str) -> tuple[str, str]:
    """`folder/key.tar.gz` → (`folder/key`, `tar.gz`): WebDataset's rule, the first dot of the last part divides."""
    folder, slash, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension.lower()


def write(shard: Path, index: ShardIndex) -> None:
    """Writes the sidecar in one step."""
    samples = [
        [sample.key, {extension: [member.offset, member.size] for extension, member in sample.members.items()}]
        for sample in index.samples
    ]
    document = {"format": _FORMAT, "shard_bytes": index.shard_bytes, "samples": samples}
    write_text(sidecar(shard), json.dumps(document, ensure_ascii=False, separators=(",", ":")))


def read(shard: Path) -> ShardIndex | None:
    """The sidecar's contents; None where there is none, or a stale or damaged one (with a warning)."""
    path = sidecar(shard)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        index = _parse(document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("unreadable index ignored: %s (%s); `diptych data index` writes it again", path, error)
        return None
    if index.shard_bytes != shard.stat().st_size:
        log.warning("stale index ignored: %s; `diptych data index` writes it again", path)
        return None
    return index


def _parse(document: dict[str, Any]) -> ShardIndex:
    if document["format"] != _FORMAT:
        raise ValueError(f"format {document['format']}, this version reads {_FORMAT}")
    samples = tuple(
        IndexedSample(key, {extension: Member(*place) for extension, place in members.items()})
        for key, members in document["samples"]
    )
    return ShardIndex(document["shard_bytes"], samples)


def count(shard: Path) -> int:
    """Samples in a shard: from its index where there is a good one, else by reading its headers."""
    index = read(shard)
    return len((index if index is not None else scan(shard)).samples)
