"""What img2dataset downloads: tars (`webdataset` form) or numbered folders (`files` form), a sample's record as JSON.

00000.tar            KEY.jpg KEY.txt KEY.json …        00000/KEY.jpg 00000/KEY.txt 00000/KEY.json
00000.parquet        every address, failures too       00000.parquet
00000_stats.json     written when 00000 is complete    00000_stats.json

Addresses that failed have no sample. The caption is in .txt and in the JSON's `caption`; its other fields become
metadata, or captions where they are asked for. Shards that `diptych data pack` wrote are read too.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from diptych import log as logs
from diptych.data import index
from diptych.data.images import picture_extension
from diptych.errors import DataError
from diptych_data.readers.family import Columns, Numbers, Part, Reader, Row, RowFault, Source
from diptych_data.readers.folder import require_inside
from diptych_data.readers.record import Picture, key_of, to_row
from diptych_data.readers.walk import find_pictures

log = logging.getLogger(__name__)
_MAX_PICTURE_BYTES = 1 << 27
_MAX_TEXT_BYTES = 1 << 20
_ABSENT = -1


@dataclass(frozen=True)
class Img2Dataset(Reader, name="img2dataset"):
    """A finished download."""

    precedence = 20

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Tars, or numbered folders with a table or statistics beside them."""
        return bool(_tars(path)) or any(
            path.joinpath(f"{folder.name}{ending}").is_file()
            for folder in _numbered(path)
            for ending in (".parquet", "_stats.json")
        )

    @classmethod
    def open(cls, path: Path, columns: Columns) -> Source:
        """Lists the samples; of tars, the headers are read."""
        if columns.key not in (None, "key"):
            raise DataError(f"only the download's own keys can be used, not {columns.key!r} · {path} · set key=key")
        _tell_failures(path)
        tars = _tars(path)
        return _TarSource(tars, columns) if tars else _FilesSource(path, columns)


def _tars(path: Path) -> list[Path]:
    inside = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    return [tar for tar in inside if tar.suffix == ".tar" and tar.is_file() and not tar.name.startswith(".")]


def _numbered(path: Path) -> list[Path]:
    return [folder for folder in sorted(path.glob("[0-9]*")) if folder.is_dir()] if path.is_dir() else []


def _tell_failures(path: Path) -> None:
    """Says how much of the download succeeded, from the statistics beside it."""
    asked = done = 0
    for file in path.glob("[0-9]*_stats.json") if path.is_dir() else ():
        try:
            stats = json.loads(file.read_bytes())
            asked, done = asked + int(stats["count"]), done + int(stats["successes"])
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("statistics of a download cannot be read: %s", file)
    if done < asked:
        log.info("the download has %d of %d pictures; the others failed and have no sample: %s", done, asked, path)


class _TarSource(Source):
    def __init__(self, tars: list[Path], columns: Columns) -> None:
        self._tars, self._columns = tuple(tars), columns
        self._keys: list[str] = []
        self._faults: dict[int, str] = {}
        with logs.progress("reading tars", len(tars)) as bar:
            places = np.fromiter((place for number in range(len(tars)) for place in self._find(number, bar)), np.int64)
        self._places = places.reshape(-1, 7)
        self.num_rows = len(self._places)
        if not self.num_rows:
            raise DataError(f"tars hold no samples · {tars[0].parent} · check the download")
        parts = [(tar.name, tar.stat().st_size, tar.stat().st_mtime_ns) for tar in tars]
        self.identity = blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _find(self, number: int, bar: logs.Bar) -> Iterator[int]:
        """Seven numbers for each sample: the tar, then where its picture, JSON and text are, and how long."""
        tar = self._tars[number]
        try:
            contents = index.read(tar) or index.scan(tar)
        except OSError as error:
            raise DataError(f"tar cannot be read ({error.strerror}) · {tar} · check its permissions") from error
        for sample in contents.samples:
            members = {member.extension: (member.offset, member.size) for member in sample.members}
            self._keys.append(sample.key)
            yield number
            for extension in (picture_extension(members), "json", "txt"):
                yield from members.get(extension or "", (_ABSENT, 0))
        if contents.fault:
            self._faults[len(self._keys)] = contents.fault
            self._keys.append("")
            yield from (number, *[_ABSENT, 0] * 3)
        bar.advance()

    def part(self, numbers: Numbers) -> Part:
        """Some samples."""
        entries = [(self._keys[i], self._faults.get(i, "")) for i in numbers.tolist()]
        return _TarPart(self._tars, self._places[numbers], tuple(entries), self._columns)

    def where(self, number: int) -> str:
        """Tar and key."""
        return f"{self._tars[self._places[number, 0]]}, {self._keys[number]}"

    def keys(self) -> Iterator[str | None]:
        """The samples' own keys."""
        return (Path(key).name or None for key in self._keys)


@dataclass(frozen=True)
class _TarPart(Part):
    tars: tuple[Path, ...]
    places: Int64[np.ndarray, "samples 7"]
    entries: tuple[tuple[str, str], ...]
    """Key and fault of each."""
    columns: Columns

    def rows(self) -> Iterator[Row | RowFault]:
        """The samples, or what is wrong with them."""
        for (key, fault), place in zip(self.entries, self.places.tolist(), strict=True):
            tar = self.tars[place[0]]
            try:
                if fault:
                    raise RowFault(fault, f"tar is damaged ({fault})", str(tar), "download it again", name=tar.name)
                yield self._row(tar, key, place)
            except RowFault as problem:
                yield problem

    def _row(self, tar: Path, key: str, place: list[int]) -> Row:
        where = f"{tar}, {key}"
        _, picture, picture_size, document, document_size, text, text_size = place
        if picture == _ABSENT:
            raise RowFault("no_picture", "sample has no picture", where, "remove it")
        if picture_size > _MAX_PICTURE_BYTES or max(document_size, text_size) > _MAX_TEXT_BYTES:
            raise RowFault(
                "too_large", f"sample of {picture_size + document_size + text_size} bytes", where, "remove it"
            )
        with tar.open("rb") as file:

            def read(offset: int, size: int) -> bytes | None:
                file.seek(max(offset, 0))
                return file.read(size) if offset != _ABSENT else None

            content = read(picture, picture_size) or b""
            record = _record(read(document, document_size), read(text, text_size), where)
        return _to_row(record, self.columns, where, (Path(key).name, content))


class _FilesSource(Source):
    def __init__(self, folder: Path, columns: Columns) -> None:
        self._folder, self._columns = folder, columns
        found = find_pictures(folder)
        if not found.names:
            raise DataError(f"folder holds no pictures · {folder} · check the download")
        self._names, self.num_rows, self.identity = found.names, len(found.names), found.identity

    def part(self, numbers: Numbers) -> Part:
        """Some samples."""
        return _FilesPart(self._folder, tuple(self._names[i] for i in numbers.tolist()), self._columns)

    def where(self, number: int) -> str:
        """The picture's path."""
        return str(self._folder / self._names[number])

    def keys(self) -> Iterator[str | None]:
        """The file names."""
        return (Path(name).stem for name in self._names)


@dataclass(frozen=True)
class _FilesPart(Part):
    folder: Path
    names: tuple[str, ...]
    columns: Columns

    def rows(self) -> Iterator[Row | RowFault]:
        """The samples, or what is wrong with them."""
        for name in self.names:
            picture = self.folder / name
            try:
                require_inside(picture, self.folder)
                record = _record(self._beside(picture, ".json"), self._beside(picture, ".txt"), str(picture))
                yield _to_row(record, self.columns, str(picture), (picture.name, picture))
            except RowFault as fault:
                yield fault

    def _beside(self, picture: Path, ending: str) -> bytes | None:
        path = picture.with_suffix(ending)
        if not path.is_file():
            return None
        require_inside(path, self.folder)
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise RowFault("too_large", "text file is too large", str(path), "shorten it", name=picture.name)
        return path.read_bytes()


def _record(document: bytes | None, text: bytes | None, where: str) -> dict[str, Any]:
    """A sample's fields by name, `caption` among them where there is one."""
    try:
        record = json.loads(document) if document else {}
        caption = text.decode("utf-8") if text is not None else None
    except (ValueError, RecursionError) as error:
        raise RowFault("bad_row", f"record is not JSON, or text not UTF-8 ({error})", where, "remove it") from error
    if not isinstance(record, dict):
        raise RowFault("bad_row", "record is not a JSON object", where, "remove it")
    for ours in ("meta", "captions"):
        inner = record.pop(ours, None)
        record |= inner if isinstance(inner, dict) else {}
    if not record.get("caption") and caption is not None:
        record["caption"] = caption
    if record.get("status", "success") != "success":
        raise RowFault("failed", f"download failed ({record.get('error_message')})", where, "remove it")
    return record


def _to_row(record: dict[str, Any], columns: Columns, where: str, picture: Picture) -> Row:
    name, _ = picture
    key = key_of(Path(name).stem)
    return to_row(record | {"key": key}, replace(columns, image="", key=columns.key), where, picture)
