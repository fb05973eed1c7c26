"""From a record (a table's row, a JSON object) to a `Row`: pictures found, captions split, labels and keys checked."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.errors import DataError
from diptych_data.readers.family import Columns, Row, RowFault, one_line

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_MAX_TEXT_BYTES = 1 << 20

Picture = tuple[str, Path | bytes]
"""Its name, which may be empty, and where its bytes are."""


def require_columns(header: Sequence[str], columns: Columns, path: Path) -> None:
    """Raises DataError where a column that is asked for is missing."""
    for name in columns.needed:
        if name not in header:
            close = difflib.get_close_matches(name, header, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(header) or 'none'}"
            raise DataError(one_line(f"table has no column {name!r} · {path} · {hint}"))


def find_picture(value: Any, base: Path, where: str) -> Picture:
    """The picture that a cell holds (bytes, or a map with `bytes` and `path`) or names.

    Raises:
        RowFault: no picture, or a path that leaves `base`.
    """
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return Path(str(value.get("path") or "")).name, value["bytes"]
        value = value.get("path")
    if isinstance(value, bytes):
        return "", value
    if not isinstance(value, str) or not value:
        raise RowFault("no_picture", "row has no picture", where, "fill the cell or remove the row")
    return Path(value).name, _picture_file(value, base, where)


def _picture_file(name: str, base: Path, where: str) -> Path:
    picture = Path(name)
    if "://" in name:
        raise RowFault("no_picture", f"picture is an address ({name})", where, "download the pictures first", name=name)
    if not picture.is_absolute():
        if ".." in picture.parts:
            raise RowFault(
                "bad_path",
                f"picture path leaves the table's folder ({name})",
                where,
                "write an absolute path, or set image_root",
                name=name,
            )
        picture = base / picture
    try:
        found = picture.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        raise RowFault("no_picture", f"no such picture ({name})", where, "correct the path", name=name)
    return picture


def to_row(record: Mapping[str, Any], columns: Columns, where: str, picture: Picture) -> Row:
    """The row of a record; columns without a part of their own become metadata.

    Raises:
        RowFault: a cell that cannot be used.
    """
    name, content = picture
    captions = {column: texts_of(record.get(column), columns.separator, where) for column in columns.captions}
    if not any(captions.values()):
        wanted = ", ".join(columns.captions)
        raise RowFault("no_caption", f"row has no caption in {wanted}", where, "fill it or remove the row", name=name)
    used = {columns.image, columns.label, columns.key, *columns.captions}
    meta = {str(column): _as_text(value) for column, value in record.items() if column not in used and _is_meta(value)}
    row = Row(
        where=where,
        name=name,
        picture=content,
        captions=captions,
        label=_label(record.get(columns.label), where) if columns.label is not None else None,
        key=_safe_key(record.get(columns.key), where) if columns.key is not None else None,
        meta=meta,
    )
    _require_writable(row)
    return row


def texts_of(value: Any, separator: str | None, where: str) -> tuple[str, ...]:
    """The captions of a cell: a text, a list of texts, or nothing. Raises RowFault."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        shown = str(value)[:40]
        raise RowFault("bad_caption", f"caption is neither a text nor a list of texts ({shown})", where, "correct it")
    parts = [part.strip() for text in texts for part in (text.split(separator) if separator else [text])]
    return tuple(part for part in parts if part)


def _label(value: Any, where: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():  # how tables with gaps hold whole numbers
        value = int(value)
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,9}", str(value)):
        raise RowFault("bad_label", f"label {str(value)[:40]!r} is no class number", where, "write 0, 1, 2 …")
    return int(value)


def _safe_key(value: Any, where: str) -> str:
    """A key is a file name in the tar, and the first dot of a file name ends the key."""
    key = key_of(value)
    if key is None or not _KEY.fullmatch(key):
        raise RowFault(
            "bad_key", f"key {str(value)[:80]!r} cannot name a sample", where, "use A-Z a-z 0-9 _ - alone, at most 80"
        )
    return key


def key_of(value: Any) -> str | None:
    """A cell of the key column as text."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _is_meta(value: Any) -> bool:
    return value is not None and not isinstance(value, bytes)


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | bool) else str(value)


def _require_writable(row: Row) -> None:
    try:
        size = len(json.dumps([row.name, row.captions, row.meta], ensure_ascii=False).encode())
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise RowFault("bad_text", f"text is not Unicode ({error.reason})", row.where, "correct it") from error
    if size > _MAX_TEXT_BYTES:
        raise RowFault("too_large", f"texts of {size} bytes", row.where, "shorten them", name=row.name)
