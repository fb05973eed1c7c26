"""Chosen samples become new shards: members byte for byte, keys unique, the folder complete or not there at all.

OUT/
  000000.tar                    samples in the order in which they were chosen
  000000.tar.index.jsonl
  TOOL.json, …                  what the tool says of its work
"""

import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from diptych import log as logs
from diptych.data import index
from diptych.errors import DataError
from diptych.runfolder import sync
from diptych_data.entries import Entry

_OURS = (".tar", ".index.jsonl", ".index.json", ".csv", ".json", ".jsonl", ".html", ".txt")


@dataclass(frozen=True)
class Written:
    """What is in the new shards."""

    samples: int
    shards: int
    renamed: int
    """Samples whose key was taken already."""
    skipped: dict[str, int]
    """Reason → samples that could not be read, or have an `unsafe_key`."""


def require_free(out: Path, sources: Sequence[str], *, overwrite: bool) -> None:
    """Refuses an output folder before the work begins.

    Raises:
        DataError: `out` is not empty, holds other things than shards, or is where the input lies.
    """
    target = out.resolve()
    for source in sources:
        parent = Path(source).resolve().parent
        if "://" not in source and (parent == target or target in parent.parents):
            raise DataError(f"the output folder is where the input lies ({source}) · {out} · choose another")
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"output is a file · {out} · choose a folder")
    found = [path.name for path in out.iterdir()]
    if found and not overwrite:
        raise DataError(f"output folder is not empty · {out} · choose another, or add --overwrite")
    if strange := [name for name in found if not name.endswith(_OURS)]:
        raise DataError(f"the folder holds other things than shards ({strange[0]}) · {out} · choose another")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well; else `out` stays as it was.

    Raises:
        DataError: the disk is full or the place cannot be written.
    """
    temporary, old = (out.with_name(f".{out.name}.{part}") for part in ("tmp", "old"))
    try:
        _put_back(old, out)  # killed between the two renames below
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        sync(temporary)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        temporary.rename(out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"shards not written ({error}) · {out} · free space or mend permissions, and start again"
        ) from error
    finally:
        _put_back(old, out)
        shutil.rmtree(temporary, ignore_errors=True)


def _put_back(old: Path, out: Path) -> None:
    if old.exists() and not out.exists():
        old.rename(out)


def write_shards(entries: Iterable[Entry], folder: Path, *, samples_per_shard: int, total: int | None) -> Written:
    """Writes the readable entries as shards with their indexes."""
    return write_sets([entries], folder, samples_per_shard=samples_per_shard, total=total)


def write_sets(sets: Sequence[Iterable[Entry]], folder: Path, *, samples_per_shard: int, total: int | None) -> Written:
    """Writes several sets one behind the other; a key that is taken gets the number of its set in front."""
    chosen = _Chosen()
    shards = samples = 0
    with logs.progress("writing shards", total) as bar:
        rows = chosen.rows(sets, bar)
        while (first := next(rows, None)) is not None:
            rest = islice(rows, samples_per_shard - 1)
            samples += _write_shard(folder / f"{shards:06d}.tar", first, rest)
            shards += 1
    if not samples:
        lost = ", ".join(f"{count} {reason}" for reason, count in chosen.skipped.items())
        raise DataError(f"no sample to write{f' ({lost})' if lost else ''} · choose others; nothing was changed")
    return Written(samples, shards, chosen.renamed, dict(chosen.skipped))


@dataclass
class _Chosen:
    """Gives every sample its key; counts what has none."""

    renamed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    _taken: dict[str, int] = field(default_factory=dict)
    """Key → the next number to try in front of it."""

    def rows(self, sets: Sequence[Iterable[Entry]], bar: logs.Bar) -> Iterator[tuple[str, Entry]]:
        """(new key, entry) of everything that can be written."""
        for number, entries in enumerate(sets, start=1):
            for entry in entries:
                bar.advance()
                if entry.fault or any(is_unsafe(f"{entry.key}.{extension}") for extension in entry.members):
                    self.skipped[entry.fault or "unsafe_key"] += 1
                else:
                    yield self._unique(entry.key, number), entry

    def _unique(self, key: str, number: int) -> str:
        if key not in self._taken:
            self._taken[key] = 2
            return key
        self.renamed += 1
        number = max(number, self._taken[key])
        while (name := f"{number}-{key}") in self._taken:
            number += 1
        self._taken[key], self._taken[name] = number + 1, 2
        return name


def is_unsafe(name: str) -> bool:
    """Whether a name could lead out of the folder into which somebody unpacks it."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or not name.isprintable()


def _write_shard(path: Path, first: tuple[str, Entry], rest: Iterable[tuple[str, Entry]]) -> int:
    written = write_tar(path, ((key, entry.members) for key, entry in chain([first], rest)))
    index.write(path, index.scan(path))
    return written


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """A tar of (key, members by extension), on the disk when this returns; the number of samples. Raises OSError."""
    written = 0
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for key, members in samples:
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                written += 1
        file.flush()
        os.fsync(file.fileno())
    return written
