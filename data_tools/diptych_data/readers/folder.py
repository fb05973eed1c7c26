"""A folder of pictures: captions beside them (`cat.jpg`, `cat.txt`) or in one file with a line per picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from diptych.errors import DataError
from diptych_data.readers.family import Columns, Numbers, Part, Reader, Row, RowFault, Source
from diptych_data.readers.lines import read_lines
from diptych_data.readers.walk import EXTENSIONS, find_pictures, is_outside

_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class Folder(Reader, name="folder"):
    """Every picture below a folder, sorted by path."""

    precedence = -10

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Any folder that is nothing else."""
        return path.is_dir()

    @classmethod
    def open(cls, path: Path, columns: Columns) -> Source:
        """Lists the folder."""
        return _FolderSource(path, columns)


class _FolderSource(Source):
    def __init__(self, folder: Path, columns: Columns) -> None:
        if not folder.is_dir():
            raise DataError(f"no such folder · {folder} · check the path")
        found = find_pictures(folder)
        if not found.names:
            raise DataError(f"folder holds no pictures · {folder} · expected {', '.join(sorted(EXTENSIONS))}")
        self._folder, self._names = folder, found.names
        self.num_rows, self.identity = len(found.names), found.identity
        self._captions: list[str] | None = None
        if columns.captions_file is not None:
            self._captions = _read_captions(columns.captions_file, found.names)
            text = "\n".join([found.identity, *self._captions])
            self.identity = blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def part(self, numbers: Numbers) -> Part:
        """Some pictures."""
        captions = None if self._captions is None else tuple(self._captions[i] for i in numbers)
        return _FolderPart(self._folder, tuple(self._names[i] for i in numbers), captions)

    def where(self, number: int) -> str:
        """The picture's path."""
        return str(self._folder / self._names[number])

    def keys(self) -> Iterator[str | None]:
        """There are no columns."""
        raise DataError(f"a folder of pictures has no column for keys · {self._folder} · leave key out, or use a table")


@dataclass(frozen=True)
class _FolderPart(Part):
    folder: Path
    names: tuple[str, ...]
    captions: tuple[str, ...] | None

    def rows(self) -> Iterator[Row | RowFault]:
        """The pictures with their captions, or what is wrong with them."""
        for number, name in enumerate(self.names):
            picture = self.folder / name
            try:
                require_inside(picture, self.folder)
                texts = caption_beside(picture, self.folder) if self.captions is None else self._given(number)
                yield Row(str(picture), picture.name, picture, {"txt": texts})
            except RowFault as fault:
                yield fault

    def _given(self, number: int) -> tuple[str, ...]:
        caption = self.captions[number].strip() if self.captions is not None else ""
        if not caption:
            name = self.names[number]
            where, advice = str(self.folder / name), "fill its line of the captions file"
            raise RowFault("no_caption", "caption is empty", where, advice, name=Path(name).name)
        return (caption,)


def _read_captions(path: Path, names: list[str]) -> list[str]:
    lines = read_lines(path)
    if len(lines) != len(names):
        raise DataError(
            f"{len(lines)} captions for {len(names)} pictures · {path} · write one line per picture, "
            f"in the order of their sorted paths (first: {names[0]})"
        )
    return lines


def require_inside(path: Path, folder: Path) -> None:
    """Raises RowFault for a link that leads out of the folder: what it points at was not meant to be packed."""
    if path.is_symlink() and is_outside(path, folder):
        advice = "copy what it points at into the folder"
        raise RowFault("link_outside", "link leads out of the folder", str(path), advice, name=path.name)


def caption_beside(picture: Path, folder: Path) -> tuple[str, ...]:
    """The lines of the .txt beside a picture. Raises RowFault."""
    path = picture.with_suffix(".txt")
    advice = "write it, or give captions_file=FILE or a table"
    if not path.is_file():
        raise RowFault("no_caption", f"no caption for {picture.name}", str(path), advice, name=picture.name)
    require_inside(path, folder)
    if path.stat().st_size > _MAX_TEXT_BYTES:
        raise RowFault("too_large", "caption file is too large", str(path), "shorten it", name=picture.name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowFault(
            "bad_caption", f"text is not UTF-8 (byte {error.start})", str(path), "convert it", name=picture.name
        ) from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise RowFault(
            "no_caption",
            "caption file is empty",
            str(path),
            "write a caption, or remove the picture",
            name=picture.name,
        )
    return lines
