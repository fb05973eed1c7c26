"""A CSV or TSV table: a column with picture paths, one or more with captions, one with labels if there is one."""

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diptych.errors import DataError
from diptych_data.readers.family import Row


@dataclass(frozen=True)
class Columns:
    """Which column means what."""

    image: str
    captions: tuple[str, ...]
    label: str | None
    separator: str | None
    """What divides several captions in one cell; None: a cell is one caption."""


def read(path: Path, columns: Columns) -> Sequence[Row]:
    """Rows of the table, in order; relative picture paths are looked up beside the table.

    Raises:
        DataError: no table, missing columns, a cell or label that cannot be used, a picture that is not there.
    """
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=delimiter)
            _check_header(path, table.fieldnames or [], columns)
            rows = [_row(path, number, cells, columns) for number, cells in enumerate(table, start=2)]
    except FileNotFoundError:
        raise DataError(f"no such table · {path} · check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"table is not UTF-8 (byte {error.start}) · {path} · convert it") from error
    except csv.Error as error:
        raise DataError(f"not readable as a table ({error}) · {path}") from error
    if not rows:
        raise DataError(f"table has no rows · {path}")
    return rows


def _check_header(path: Path, header: Sequence[str], columns: Columns) -> None:
    wanted = [columns.image, *columns.captions, *([columns.label] if columns.label else [])]
    for name in wanted:
        if name not in header:
            close = difflib.get_close_matches(name, header, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(header) or 'none'}"
            raise DataError(f"table has no column {name!r} · {path} · {hint}")


def _row(path: Path, number: int, cells: dict[str | None, str | None], columns: Columns) -> Row:
    where = f"{path}, row {number}"
    if None in cells or None in cells.values():
        raise DataError(f"row has another number of cells than the header · {where} · quote cells that hold commas")
    texts = {str(name): str(value) for name, value in cells.items()}
    captions = {name: _split(texts[name], columns.separator) for name in columns.captions}
    if not any(captions.values()):
        raise DataError(f"row has no caption in {', '.join(columns.captions)} · {where} · fill it or remove the row")
    used = {columns.image, columns.label, *columns.captions}
    meta = {name: value for name, value in texts.items() if name not in used}
    return Row(_picture(path, texts[columns.image], where), captions, _label(texts, columns.label, where), meta)


def _split(cell: str, separator: str | None) -> tuple[str, ...]:
    parts = cell.split(separator) if separator else [cell]
    return tuple(part.strip() for part in parts if part.strip())


def _picture(table: Path, name: str, where: str) -> Path:
    picture = Path(name)
    if not picture.is_absolute():
        if ".." in picture.parts:
            raise DataError(f"picture path leaves the table's folder ({name}) · {where} · write an absolute path")
        picture = table.parent / picture
    if not name or not picture.is_file():
        raise DataError(f"no such picture ({name}) · {where} · correct the path")
    return picture


def _label(texts: dict[str, str], column: str | None, where: str) -> int | None:
    if column is None or not texts[column]:
        return None
    if not texts[column].isdigit():
        raise DataError(f"label {texts[column]!r} is no class number · {where} · write 0, 1, 2 …")
    return int(texts[column])
