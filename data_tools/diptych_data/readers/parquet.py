"""Parquet: one file or a folder of parts, pictures as paths or as bytes (`{"bytes": …, "path": …}`, or plain binary).

Rows are read by row group. Where that would read too much for too little (rows shuffled, or row groups that do not fit
into memory), the columns are copied once, uncompressed, into Arrow files of the working folder, which are mapped into
memory and read anywhere. pyarrow is imported here alone.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from diptych import log as logs
from diptych.errors import DataError
from diptych_data.readers.family import Columns, Numbers, Part, Reader, Row, RowFault, Source
from diptych_data.readers.record import find_picture, key_of, require_columns, to_row
from diptych_data.readers.walk import parts_of

_SUFFIXES = (".parquet", ".pq")
_MAX_GROUP_BYTES = 1 << 25
"""Row groups larger than this, uncompressed, are copied in smaller pieces."""
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Parquet(Reader, name="parquet"):
    """One row per picture, by columns."""

    precedence = 10

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the names of the files."""
        return bool(parts_of(path, _SUFFIXES))

    @classmethod
    def open(cls, path: Path, columns: Columns) -> Source:
        """Reads the files' footers."""
        return _ParquetSource(path, columns)


@dataclass(frozen=True)
class _File:
    """One file, divided into blocks: the row groups of parquet, the batches of an Arrow copy."""

    path: Path
    starts: Int64[np.ndarray, " blocks+1"]
    """First row of each block, and the number of rows behind them."""
    wanted: tuple[str, ...]
    """Columns that are read."""
    largest: int = 0
    """Bytes of the largest block."""
    copy: Path | None = None
    """Where the rows are read from instead."""

    @property
    def num_rows(self) -> int:
        """Rows in all blocks."""
        return int(self.starts[-1])


class _ParquetSource(Source):
    def __init__(self, path: Path, columns: Columns) -> None:
        paths = parts_of(path, _SUFFIXES) or ((path,) if path.is_file() else ())
        self._columns = columns
        self._files = [_open(file, columns) for file in paths]
        self._firsts = np.cumsum([0, *(file.num_rows for file in self._files)])
        self.num_rows = int(self._firsts[-1])
        if not self.num_rows:
            raise DataError(f"table has no rows · {path} · check the file")
        parts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in paths]
        self.identity = blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def prepare(self, scratch: Path, order: Literal["source", "shuffled"]) -> None:
        """Copies the files whose rows cannot be read block by block."""
        for number, file in enumerate(self._files):
            if order == "shuffled" or file.largest > _MAX_GROUP_BYTES:
                self._files[number] = _copied(file, scratch / f"rows-{number:05d}.arrow")

    def part(self, numbers: Numbers) -> Part:
        """Some rows."""
        file_numbers = np.searchsorted(self._firsts, numbers, side="right") - 1
        used, files = np.unique(file_numbers, return_inverse=True)
        rows = numbers - self._firsts[file_numbers]
        blocks = np.empty_like(rows)
        for place, number in enumerate(used):
            here = files == place
            blocks[here] = np.searchsorted(self._files[number].starts, rows[here], side="right") - 1
        places = np.stack([files, blocks, rows], axis=1)
        return _ParquetPart(tuple(self._files[number] for number in used), places, self._columns)

    def where(self, number: int) -> str:
        """File and row; the first row is row 1."""
        file = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return _where(self._files[file], number - int(self._firsts[file]))

    def keys(self) -> Iterator[str | None]:
        """The values of the key column."""
        for file in self._files:
            with _parquet(file.path) as opened:
                for batch in opened.iter_batches(columns=[self._columns.key], use_threads=False):
                    yield from (key_of(value) for value in batch.column(0).to_pylist())


@dataclass(frozen=True)
class _ParquetPart(Part):
    files: tuple[_File, ...]
    places: Int64[np.ndarray, "rows 3"]
    """File, block and row of the file."""
    columns: Columns

    def rows(self) -> Iterator[Row | RowFault]:
        """The rows, or what is wrong with them."""
        current: tuple[int, int] | None = None
        block: Any = None
        with ExitStack() as stack:
            opened: dict[int, Any] = {}
            for number, block_number, row in self.places.tolist():
                file = self.files[number]
                if number not in opened:
                    stack.close()
                    opened = {number: stack.enter_context(_parquet(file.path) if file.copy is None else _arrow(file))}
                if current != (number, block_number):
                    current, block = (number, block_number), _block(opened[number], file, block_number)
                yield self._row(block.slice(row - int(file.starts[block_number]), 1), file, _where(file, row))

    def _row(self, table: Any, file: _File, where: str) -> Row | RowFault:
        try:
            (record,) = table.to_pylist()
            base = self.columns.image_root or file.path.parent
            return to_row(record, self.columns, where, find_picture(record[self.columns.image], base, where))
        except RowFault as fault:
            return fault
        except ValueError as error:  # text that is not UTF-8, a time that Python cannot hold
            return RowFault("bad_row", f"row cannot be read ({error})", where, "correct it")


def _where(file: _File, row: int) -> str:
    return f"{file.path}, row {row + 1}"


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f'reading parquet needs pyarrow · {path} · pip install "diptych[parquet]"') from error
    return pyarrow


def _parquet(path: Path) -> Any:
    """An open parquet file, for `with`. Raises DataError."""
    pyarrow = _pyarrow(path)
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"not readable as parquet ({reason}) · {path} · write it again, or give form=NAME") from error


def _arrow(file: _File) -> Any:
    """An open Arrow copy, for `with`."""
    pyarrow = _pyarrow(file.path)
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(file.copy)))


def _open(path: Path, columns: Columns) -> _File:
    with _parquet(path) as opened:
        schema, metadata = opened.schema_arrow, opened.metadata
        require_columns(schema.names, columns, path)
        wanted = tuple(field.name for field in schema if field.name in columns.needed or _is_meta(field))
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        starts = np.cumsum([0, *(group.num_rows for group in groups)])
        return _File(path, starts, wanted, max((group.total_byte_size for group in groups), default=0))


def _is_meta(field: Any) -> bool:
    """Whether a column may travel along: no bytes, and not the row names that pandas adds."""
    return "binary" not in str(field.type) and not field.name.startswith("__index_level_")


def _block(opened: Any, file: _File, number: int) -> Any:
    if file.copy is not None:
        return opened.get_batch(number)
    return opened.read_row_group(number, columns=list(file.wanted), use_threads=False)


def _copied(file: _File, copy: Path) -> _File:
    """The file with an Arrow copy beside it; one that is there from before is complete."""
    pyarrow = _pyarrow(file.path)
    if not copy.exists():
        part = copy.with_name(f"{copy.name}.part")
        with _parquet(file.path) as opened, logs.progress(f"copying {file.path.name}", file.num_rows) as bar:
            batches = opened.iter_batches(_BATCH_ROWS, columns=list(file.wanted), use_threads=False)
            schema = pyarrow.schema([field for field in opened.schema_arrow if field.name in file.wanted])
            with pyarrow.ipc.new_file(str(part), schema) as writer:
                for batch in batches:
                    writer.write_batch(batch.select(schema.names))
                    bar.advance(batch.num_rows)
        part.replace(copy)
    with pyarrow.ipc.open_file(pyarrow.memory_map(str(copy))) as reader:
        sizes = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
    return _File(file.path, np.cumsum([0, *sizes]), file.wanted, copy=copy)
