"""Text files of many lines: where each record lies, and the records of some places. Nothing is held but the places."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Int64

from diptych.errors import DataError
from diptych_data.readers.family import Numbers

_MAX_LINE_BYTES = 1 << 24
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Spans:
    """Pieces of files."""

    paths: tuple[Path, ...]
    places: Int64[np.ndarray, "spans 4"]
    """File number, first byte, number of bytes, line or row as people count."""

    def __len__(self) -> int:
        return len(self.places)

    def take(self, numbers: Numbers) -> "Spans":
        """The spans of these numbers."""
        return Spans(self.paths, self.places[numbers])

    def where(self, number: int, unit: str) -> str:
        """A span's place, for people."""
        return f"{self.paths[self.places[number, 0]]}, {unit} {self.places[number, 3]}"

    def read(self) -> Iterator[bytes]:
        """The bytes of every span, in order. Raises OSError."""
        opened: tuple[int, IO[bytes]] | None = None
        try:
            for file_number, start, size, _ in _rows(self.places):
                if opened is None or opened[0] != file_number:
                    if opened is not None:
                        opened[1].close()
                    opened = (file_number, self.paths[file_number].open("rb"))
                opened[1].seek(start)
                yield opened[1].read(size)
        finally:
            if opened is not None:
                opened[1].close()


def _rows(places: Int64[np.ndarray, "spans 4"]) -> Iterator[list[int]]:
    """Some at a time: a million lists of integers take more room than the text that they stand for."""
    for first in range(0, len(places), 1024):
        yield from places[first : first + 1024].tolist()


class Lines:
    """The lines of a file as bytes, with `offset` behind the last one and a checksum of all."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self.offset = 0
        self.checksum = blake2b(digest_size=16)

    def __iter__(self) -> Iterator[bytes]:
        while line := self._file.readline(_MAX_LINE_BYTES + 1):
            if len(line) > _MAX_LINE_BYTES:
                raise DataError(
                    f"line longer than {_MAX_LINE_BYTES} bytes · {self._path}, byte {self.offset} · split it"
                )
            self.checksum.update(line)
            first, self.offset = self.offset == 0, self.offset + len(line)
            yield line.removeprefix(BOM) if first else line


def decode_line(line: bytes, offset: int, path: Path) -> str:
    """The text of a line. Raises DataError that names the first wrong byte."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"table is not UTF-8 (byte {offset + error.start}) · {path} · convert it") from error


def spans(paths: tuple[Path, ...], places: Iterable[tuple[int, int, int, int]]) -> Spans:
    """Collects places as they are found."""
    flat = array("q")
    for place in places:
        flat.extend(place)
    return Spans(paths, np.frombuffer(flat, np.int64).reshape(-1, 4))


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"no such file · {path} · check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"text is not UTF-8 (byte {error.start}) · {path} · convert it") from error
