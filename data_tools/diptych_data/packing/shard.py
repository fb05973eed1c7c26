"""One shard from its rows: complete with index and outcome, or not there at all.

Three files are made, each written under a temporary name, synced and renamed, in this order: the outcome (how many
samples, which rows were left out), the tar, its index. Where the index is there, the shard is complete.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from diptych.data import index
from diptych.data.faults import UnusableSample
from diptych.errors import DataError
from diptych.runfolder import write_text
from diptych_data.packing.encode import Encoded, Shrink, encode
from diptych_data.readers.family import Numbers, Part, Row, RowFault


@dataclass(frozen=True)
class Task:
    """A shard to be written; travels to the process that does it."""

    tar: Path
    outcome: Path
    numbers: Numbers
    """Numbers of its rows in the source."""
    part: Part
    on_bad: Literal["stop", "skip"]
    shrink: Shrink | None
    txt: Literal["first", "all"]
    """Captions in the .txt member: the first, or all that differ, a line each."""


@dataclass(frozen=True)
class Skipped:
    """A row that was left out."""

    row: int
    """Its number in the source, from 0: what its key would have been."""
    name: str
    where: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of a shard's rows."""

    samples: int
    skipped: tuple[Skipped, ...]

    @property
    def rows(self) -> int:
        """All of them."""
        return self.samples + len(self.skipped)


def write(task: Task) -> Outcome:
    """Writes a shard.

    Raises:
        DataError: a row cannot be packed, and `on_bad` is `stop`.
        OSError: the disk is full, or will not be written to.
    """
    samples, skipped = 0, []
    part = task.tar.with_name(f".{task.tar.name}.{os.getpid()}.part")
    with _removed_on_failure(part), part.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, row in zip(task.numbers.tolist(), task.part.rows(), strict=True):
                try:
                    usable, picture = _usable(row, task.shrink)
                except RowFault as fault:
                    if task.on_bad == "stop":
                        raise DataError(str(fault)) from fault
                    skipped.append(Skipped(number, fault.name, fault.where, fault.reason))
                    continue
                text = _text(usable, task.txt)
                _add_sample(tar, usable.key or f"{number:08d}", usable, picture=picture, text=text)
                samples += 1
        file.flush()
        os.fsync(file.fileno())
        outcome = Outcome(samples, tuple(skipped))
        write_text(task.outcome, json.dumps(asdict(outcome), ensure_ascii=False))
        part.replace(task.tar)
    index.write(task.tar, index.scan(task.tar))
    return outcome


def finished(tar: Path, outcome: Path) -> Outcome | None:
    """What became of a shard that is complete; None for one that is still to be written."""
    if not (tar.is_file() and outcome.is_file() and index.sidecar(tar).is_file() and index.read(tar) is not None):
        return None
    return read_outcome(outcome)


def read_outcome(path: Path) -> Outcome:
    """An outcome as it was written."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(document["samples"], tuple(Skipped(**skipped) for skipped in document["skipped"]))


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _usable(row: Row | RowFault, shrink: Shrink | None) -> tuple[Row, Encoded]:
    if isinstance(row, RowFault):
        raise row
    try:
        return row, encode(row.picture, shrink)
    except UnusableSample as fault:
        where = str(row.picture) if isinstance(row.picture, Path) else row.where
        advice = "replace it, or pack with on_bad=skip"
        reason = " ".join(str(fault).split())
        raise RowFault(fault.reason, f"unreadable picture ({reason})", where, advice, name=row.name) from fault


def _text(row: Row, which: Literal["first", "all"]) -> str:
    texts = [text for texts in row.captions.values() for text in texts]
    return texts[0] if which == "first" else "\n".join(dict.fromkeys(" ".join(text.splitlines()) for text in texts))


def _add_sample(tar: tarfile.TarFile, key: str, row: Row, *, picture: Encoded, text: str) -> None:
    meta = row.meta | ({"file": row.name} if row.name else {})
    _add(tar, f"{key}.{picture.extension}", picture.data)
    if row.label is not None:
        _add(tar, f"{key}.cls", str(row.label).encode())
    document = {"captions": row.captions, "meta": meta}
    _add(tar, f"{key}.json", json.dumps(document, ensure_ascii=False).encode())
    _add(tar, f"{key}.txt", text.encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A plain member without owner or time, so that equal input gives equal bytes."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
