"""JSON lines: one object per line, in one file or a folder of parts. A caption is a text or a list of texts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from diptych.errors import DataError
from diptych_data.readers.family import Columns, Numbers, Part, Reader, Row, RowFault, Source
from diptych_data.readers.lines import Lines, Spans, decode_line, spans
from diptych_data.readers.record import find_picture, key_of, require_columns, to_row
from diptych_data.readers.walk import parts_of

_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class JsonLines(Reader, name="jsonl"):
    """One object per picture."""

    precedence = 10

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the names of the files."""
        return bool(parts_of(path, _SUFFIXES))

    @classmethod
    def open(cls, path: Path, columns: Columns) -> Source:
        """Reads the files once to learn where their lines lie."""
        return _JsonSource(path, columns)


class _JsonSource(Source):
    def __init__(self, path: Path, columns: Columns) -> None:
        self._columns = columns
        self._checksum = blake2b(digest_size=16)
        paths = parts_of(path, _SUFFIXES) or ((path,) if path.is_file() else ())
        self._spans = spans(paths, (place for number in range(len(paths)) for place in self._find(paths, number)))
        if not len(self._spans):
            raise DataError(f"table has no rows · {path} · write one JSON object per line")
        self.num_rows, self.identity = len(self._spans), self._checksum.hexdigest()
        self._require_columns()

    def _find(self, paths: tuple[Path, ...], number: int) -> Iterator[tuple[int, int, int, int]]:
        with paths[number].open("rb") as file:
            lines = Lines(file, paths[number])
            for count, line in enumerate(lines, start=1):
                decode_line(line, lines.offset - len(line), paths[number])
                if line.strip():
                    yield number, lines.offset - len(line), len(line), count
        self._checksum.update(f"{paths[number].name} {lines.checksum.hexdigest()}\n".encode())

    def _require_columns(self) -> None:
        first = self._spans.take(np.zeros(1, np.int64))
        try:
            names = list(_parse(next(first.read()), first.where(0, "line")))
        except RowFault:
            return  # a bad row, which may be skipped
        require_columns(names, self._columns, first.paths[first.places[0, 0]])

    def part(self, numbers: Numbers) -> Part:
        """Some rows."""
        return _JsonPart(self._spans.take(numbers), self._columns)

    def where(self, number: int) -> str:
        """File and line."""
        return self._spans.where(number, "line")

    def keys(self) -> Iterator[str | None]:
        """The values of the key column."""
        for data in self._spans.read():
            try:
                yield key_of(_parse(data, "").get(str(self._columns.key)))
            except RowFault:
                yield None


@dataclass(frozen=True)
class _JsonPart(Part):
    places: Spans
    columns: Columns

    def rows(self) -> Iterator[Row | RowFault]:
        """The rows, or what is wrong with them."""
        for number, data in enumerate(self.places.read()):
            where = self.places.where(number, "line")
            base = self.columns.image_root or self.places.paths[self.places.places[number, 0]].parent
            try:
                record = _parse(data, where)
                picture = find_picture(record.get(self.columns.image), base, where)
                yield to_row(record, self.columns, where, picture)
            except RowFault as fault:
                yield fault


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RowFault("bad_row", f"line is not JSON ({error})", where, "write one object per line") from error
    if not isinstance(record, dict):
        raise RowFault("bad_row", "line is not a JSON object", where, 'write {"image": …, "caption": …}')
    return record
