"""Sets of pictures as tasks ask for them: WebDataset shards, a folder per class, or files that an annotation names.

A set is a numbered list whose entries are read when their turn comes. `open_pictures` tells shards from a folder per
class by what lies there; a task that reads annotations builds `FilePictures` itself. Another source is one class with
these members.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diptych.data import captions
from diptych.data.faults import UnusableSample
from diptych.data.images import picture_extension
from diptych.data.prepare import picture_bytes
from diptych.data.shards import OpenShard, RawSample, ShardStore, list_shards
from diptych.errors import DataError

Box = tuple[int, int, int, int]
"""Left, upper, right, lower; pixels."""


@dataclass(frozen=True)
class Negative:
    """A caption that is not true of its picture, as `diptych data negatives` writes it."""

    text: str
    of: str
    """The true caption that it was made from."""
    kind: str
    """How it was made and what was changed: `replace colour`."""


@dataclass(frozen=True)
class Entry:
    """One entry of a set, the picture not yet decoded."""

    key: str
    picture: bytes
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Column → texts."""
    labels: tuple[int, ...] = ()
    """Class numbers: one, several for multi-label sets, none where unknown."""
    meta: dict[str, str] = field(default_factory=dict)
    """The other columns."""
    box: Box | None = None
    """The part of the picture that is meant; none: all of it."""
    negatives: tuple[Negative, ...] = ()


class Pictures(Protocol):
    """A set of pictures."""

    @property
    def where(self) -> str:
        """For messages, and to tell sets apart."""
        ...

    @property
    def files(self) -> Sequence[str]:
        """What the set is made of."""
        ...

    @property
    def variant(self) -> str:
        """What is made of the files, where that can be several things. When files and variant stay, so does the set."""
        ...

    def __len__(self) -> int:
        """Entries, unusable ones among them."""
        ...

    def read(self, number: int) -> Entry:
        """Raises UnusableSample where this entry is none, DataError where the set is broken."""
        ...


class ShardPictures:
    """WebDataset shards: in a folder, of a glob, or of a brace pattern."""

    def __init__(self, pattern: str) -> None:
        """Raises DataError where there are none."""
        self.where, self.variant = pattern, ""
        self.files: Sequence[str] = list_shards(pattern)
        self._store = ShardStore()

    @cached_property
    def _places(self) -> list[tuple[OpenShard, int]]:
        shards = [self._store.open(name) for name in self.files]
        return [(shard, number) for shard in shards for number in range(shard.num_entries)]

    def __len__(self) -> int:
        return len(self._places)

    def read(self, number: int) -> Entry:
        """See Pictures."""
        shard, place = self._places[number]
        raw = shard.read(place)
        said = captions.parse(raw.members)
        return Entry(
            raw.key,
            picture_bytes(raw.members),
            _captions(said.columns),
            _labels(raw),
            _meta(said.document),
            negatives=_negatives(said.document),
        )


def _captions(columns: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """By column; a `.txt` member has a caption per line, as clip-benchmark writes several."""
    return {**columns, "txt": tuple(line for text in columns.get("txt", ()) for line in text.splitlines() if line)}


def _labels(raw: RawSample) -> tuple[int, ...]:
    """A `.cls` member is one class number, a `.npy` member (clip-benchmark's multi-label sets) marks several."""
    try:
        if "cls" in raw.members:
            return (int(raw.members["cls"]),)
        if "npy" in raw.members:
            marks = np.load(io.BytesIO(raw.members["npy"]), allow_pickle=False)
            return tuple(np.flatnonzero(marks > 0).tolist())
    except ValueError as error:
        raise UnusableSample("bad_label", str(error)) from error
    return ()


def _meta(document: Mapping[str, Any]) -> dict[str, str]:
    meta = document.get("meta")
    return {str(key): str(value) for key, value in meta.items()} if isinstance(meta, dict) else {}


def _negatives(document: Mapping[str, Any]) -> tuple[Negative, ...]:
    records = document.get("negatives")
    found = []
    for record in records if isinstance(records, list) else ():
        text, of, how, kind = (
            record.get(key) if isinstance(record, dict) else None for key in ("text", "of", "how", "type")
        )
        if all(isinstance(value, str) and value for value in (text, of, how, kind)):
            found.append(Negative(str(text), str(of), f"{how} {kind}"))
    return tuple(found)


@dataclass(frozen=True)
class PictureFile:
    """One picture of `FilePictures`."""

    path: Path
    key: str
    label: int | None = None
    box: Box | None = None


class FilePictures:
    """Picture files, as folders or an annotation name them."""

    def __init__(self, where: str, pictures: Sequence[PictureFile]) -> None:
        """Raises DataError where one is missing: a protocol that leaves pictures out is another one."""
        self.where = where
        self.files: Sequence[str] = [str(picture.path) for picture in pictures]
        self._pictures = list(pictures)
        self.variant = hashlib.sha256(repr([(p.key, p.label, p.box) for p in pictures]).encode()).hexdigest()
        missing = [path for path in dict.fromkeys(self.files) if not Path(path).is_file()]
        if missing:
            raise DataError(f"{len(missing):,} pictures are missing ({missing[0]}) · {where} · copy them there")

    def relabelled(self, labels: Mapping[int | None, int]) -> "FilePictures":
        """The pictures whose label is in the map, under their new ones."""
        kept = [replace(p, label=new) for p in self._pictures if (new := labels.get(p.label)) is not None]
        return FilePictures(self.where, kept)

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, number: int) -> Entry:
        """See Pictures."""
        picture = self._pictures[number]
        try:
            data = picture.path.read_bytes()
        except OSError as error:
            raise UnusableSample("unreadable", str(error)) from error
        labels = (picture.label,) if picture.label is not None else ()
        return Entry(picture.key, data, labels=labels, box=picture.box)


@dataclass(frozen=True)
class ClassFolders:
    """A folder per class (torchvision's ImageFolder): class numbers follow the sorted folder names."""

    pictures: FilePictures
    names: tuple[str, ...]


def class_folders(root: Path) -> ClassFolders:
    """Raises DataError where no subfolder holds pictures."""
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []
    found = [(path, number) for number, folder in enumerate(folders) for path in sorted(folder.rglob("*"))]
    found = [(path, number) for path, number in found if picture_extension([path.suffix[1:].lower()])]
    if not found:
        raise DataError(f"no subfolder with pictures · {root} · one folder per class, or shards")
    pictures = [PictureFile(path, str(path.relative_to(root)), label) for path, label in found]
    return ClassFolders(FilePictures(str(root), pictures), tuple(folder.name for folder in folders))


def open_pictures(path: str) -> Pictures:
    """Shards, or where a folder holds none a folder per class.

    Raises:
        DataError: it is neither.
    """
    root = Path(path)
    if root.is_dir() and not any(root.glob("*.tar")) and any(inner.is_dir() for inner in root.iterdir()):
        return class_folders(root).pictures
    return ShardPictures(path)
