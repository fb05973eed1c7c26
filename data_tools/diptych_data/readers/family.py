"""The seam between sources and shards: a reader turns a source into rows. One file per kind of source."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Row:
    """One picture with its texts."""

    picture: Path
    captions: dict[str, tuple[str, ...]]
    """Column → texts."""
    label: int | None = None
    meta: dict[str, str] = field(default_factory=dict)
    """Everything else that is known of it."""


class Reader(Protocol):
    """A source of rows."""

    def __call__(self) -> Sequence[Row]:
        """All rows in order. Raises DataError where the source cannot be used."""
        ...
