"""The seam between sources and shards: a reader opens a source, a source has numbered rows.

A new kind of source is one file in this folder with a `Reader`. A source never holds its rows: it knows where each lies
(an offset, a path), and `part` gives the little that another process needs to read some of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int64

from diptych.config import Choice, discover
from diptych.errors import ConfigError, DataError

Numbers = Int64[np.ndarray, " rows"]


@dataclass(frozen=True)
class Columns:
    """Which column means what."""

    image: str = "image"
    captions: tuple[str, ...] = ("caption",)
    label: str | None = None
    key: str | None = None
    separator: str | None = None
    """What divides several captions in one text; None: a text is one caption."""
    captions_file: Path | None = None
    """A folder's captions, one per picture; None: they lie beside the pictures."""
    image_root: Path | None = None
    """Folder that relative picture paths start from; None: the table's own."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that a table must have."""
        return tuple(name for name in (self.image, *self.captions, self.label, self.key) if name is not None)


@dataclass(frozen=True)
class Row:
    """One picture with its texts."""

    where: str
    """For people: `table.csv, row 3`, or the picture's path."""
    name: str
    """File name of the picture; empty where it has none."""
    picture: Path | bytes
    captions: dict[str, tuple[str, ...]]
    """Column → texts."""
    label: int | None = None
    key: str | None = None
    """Its key in the shard; None: its number."""
    meta: dict[str, str] = field(default_factory=dict)
    """Everything else that is known of it."""


def one_line(text: str) -> str:
    """A message that quotes the source, without line ends or codes that a terminal would obey, and not endless."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= 500 else f"{shown[:240]} … {shown[-240:]}"


class RowFault(Exception):
    """A row that cannot be packed: raised where it is read, then a value among the rows."""

    def __init__(self, reason: str, problem: str, where: str, advice: str, *, name: str = "") -> None:
        super().__init__(one_line(f"{problem} · {where} · {advice}"))
        self.reason, self.where, self.name = reason, where, name


class Part(ABC):
    """Some rows of a source, small enough to be sent to another process, which reads them."""

    @abstractmethod
    def rows(self) -> Iterator[Row | RowFault]:
        """The rows, in the order of the numbers that were asked for.

        Raises:
            DataError: the source changed since it was opened.
            OSError: it cannot be read any more.
        """


class Source(ABC):
    """Rows by number."""

    num_rows: int
    identity: str
    """Checksum of what is read: another one, and shards that are begun cannot be gone on with."""

    @abstractmethod
    def part(self, numbers: Numbers) -> Part:
        """The rows of these numbers, which may stand in any order."""

    @abstractmethod
    def where(self, number: int) -> str:
        """A row's place, for people."""

    @abstractmethod
    def keys(self) -> Iterator[str | None]:
        """What each row has in the key column, in order; None where it has nothing.

        Raises:
            DataError: such a source has no columns.
        """

    def prepare(self, scratch: Path, order: Literal["source", "shuffled"]) -> None:  # noqa: B027, most need nothing
        """Makes ready for `part`; called once before it.

        Args:
            scratch: folder that stays until the work is done, over interruptions too.
        """


class Reader(Choice):
    """A kind of source."""

    precedence: ClassVar[int] = 0
    """Where several readers recognise a source, the highest has it."""

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether this is such a source. `path` exists."""

    @classmethod
    @abstractmethod
    def open(cls, path: Path, columns: Columns) -> Source:
        """The source at `path`. Raises DataError where it cannot be used."""


def open_source(path: Path, form: str, columns: Columns) -> Source:
    """The rows of `path`.

    Args:
        form: the reader's name; `auto`: the one that recognises the source.

    Raises:
        ConfigError: there is no such reader.
        DataError: nobody knows such a source, or it cannot be used.
    """
    discover(__package__)
    if not path.exists():
        raise DataError(f"no such folder or table · {path} · check the path")
    if form != "auto":
        if form not in Reader.members:
            raise ConfigError(f"unknown form {form!r} · form · one of auto, {', '.join(sorted(Reader.members))}")
        return _open(Reader.named(form), path, columns)
    readers = sorted((Reader.named(name) for name in Reader.members), key=lambda reader: -reader.precedence)
    for reader in readers:
        if reader.recognises(path):
            return _open(reader, path, columns)
    raise DataError(
        f"not a source that can be packed · {path} · give a folder, .csv, .tsv, .jsonl, .parquet or form=NAME"
    )


def _open(reader: type[Reader], path: Path, columns: Columns) -> Source:
    try:
        return reader.open(path, columns)
    except OSError as error:
        raise DataError(f"source cannot be read ({error.strerror}) · {error.filename or path} · check it") from error
