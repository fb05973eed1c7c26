"""A CSV or TSV table: a column with picture paths, one or more with captions, one with labels if there is one."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diptych.errors import DataError
from diptych_data.readers.family import Columns, Numbers, Part, Reader, Row, RowFault, Source
from diptych_data.readers.lines import Lines, Spans, decode_line, spans
from diptych_data.readers.record import find_picture, key_of, require_columns, to_row

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}


@dataclass(frozen=True)
class Table(Reader, name="table"):
    """One row per picture, with a header."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the file's name."""
        return path.is_file() and path.suffix.lower() in _DELIMITERS

    @classmethod
    def open(cls, path: Path, columns: Columns) -> Source:
        """Reads the table once to learn where its rows lie."""
        return _TableSource(path, columns)


class _TableSource(Source):
    def __init__(self, path: Path, columns: Columns) -> None:
        self._columns, self._header = columns, []
        try:
            with path.open("rb") as file:
                lines = Lines(file, path)
                self._spans = spans((path,), self._find(lines, path))
                self.identity = lines.checksum.hexdigest()
        except csv.Error as error:
            raise DataError(f"not readable as a table ({error}) · {path} · look for an open quote") from error
        if not len(self._spans):
            raise DataError(f"table has no rows · {path} · check the file")
        self.num_rows = len(self._spans)

    _header: list[str]

    def _find(self, lines: Lines, path: Path) -> Iterator[tuple[int, int, int, int]]:
        """The place of each row. A quoted cell may hold line ends, so only the parser knows where a row ends."""
        reader = csv.reader(
            (decode_line(line, lines.offset - len(line), path) for line in lines), delimiter=_delimiter(path)
        )
        self._header = next(reader, [])
        require_columns(self._header, self._columns, path)
        start, number = lines.offset, 2
        for cells in reader:
            if cells:
                yield 0, start, lines.offset - start, number
                number += 1
            start = lines.offset

    def part(self, numbers: Numbers) -> Part:
        """Some rows."""
        return _TablePart(self._spans.take(numbers), tuple(self._header), self._columns)

    def where(self, number: int) -> str:
        """Table and row; the header is row 1."""
        return self._spans.where(number, "row")

    def keys(self) -> Iterator[str | None]:
        """The cells of the key column."""
        place = self._header.index(str(self._columns.key))
        for cells in _TablePart(self._spans, tuple(self._header), self._columns).cells():
            yield key_of(cells[place]) if place < len(cells) else None


@dataclass(frozen=True)
class _TablePart(Part):
    places: Spans
    header: tuple[str, ...]
    columns: Columns

    def cells(self) -> Iterator[list[str]]:
        """The cells of each row."""
        path = self.places.paths[0]
        for data in self.places.read():
            try:
                text = io.StringIO(data.decode("utf-8"), newline="")
                yield next(csv.reader(text, delimiter=_delimiter(path)))
            except (UnicodeDecodeError, csv.Error, StopIteration) as error:
                raise DataError(f"table changed while it was read · {path} · start again") from error

    def rows(self) -> Iterator[Row | RowFault]:
        """The rows, or what is wrong with them."""
        for number, cells in enumerate(self.cells()):
            where = self.places.where(number, "row")
            try:
                yield self._row(cells, where)
            except RowFault as fault:
                yield fault

    def _row(self, cells: list[str], where: str) -> Row:
        if len(cells) != len(self.header):
            raise RowFault(
                "bad_row", "row has another number of cells than the header", where, "quote cells that hold commas"
            )
        record = dict(zip(self.header, cells, strict=True))
        base = self.columns.image_root or self.places.paths[0].parent
        return to_row(record, self.columns, where, find_picture(record[self.columns.image], base, where))


def _delimiter(path: Path) -> str:
    return _DELIMITERS.get(path.suffix.lower(), ",")
