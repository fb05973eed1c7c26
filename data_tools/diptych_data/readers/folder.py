"""A folder of pictures: captions beside them (`cat.jpg`, `cat.txt`) or in one file with a line per picture."""

from collections.abc import Sequence
from pathlib import Path

from diptych.errors import DataError
from diptych_data.readers.family import Row

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


def read(folder: Path, captions_file: Path | None = None) -> Sequence[Row]:
    """Rows for every picture below `folder`, sorted by path.

    Args:
        captions_file: one caption per line, in the order of the sorted paths; None: `NAME.txt` beside each picture,
            one caption per line.

    Raises:
        DataError: no folder, no pictures, a picture without caption, or another number of captions than of pictures.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder · {folder} · check the path")
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not pictures:
        raise DataError(f"folder holds no pictures · {folder} · expected {', '.join(sorted(EXTENSIONS))}")
    if captions_file is not None:
        lines = read_lines(captions_file)
        if len(lines) != len(pictures):
            raise DataError(
                f"{len(lines)} captions for {len(pictures)} pictures · {captions_file} · write one line per picture, "
                f"in the order of their sorted paths (first: {pictures[0].name})"
            )
        return [Row(picture, {"txt": (line,)}) for picture, line in zip(pictures, lines, strict=True)]
    return [Row(picture, {"txt": _beside(picture)}) for picture in pictures]


def _beside(picture: Path) -> tuple[str, ...]:
    path = picture.with_suffix(".txt")
    if not path.is_file():
        raise DataError(f"no caption for {picture.name} · {path} · write it, or give captions_file=FILE or a CSV table")
    lines = tuple(line for line in read_lines(path) if line.strip())
    if not lines:
        raise DataError(f"caption file is empty · {path} · write a caption, or remove the picture")
    return lines


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"no such file · {path} · check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"text is not UTF-8 (byte {error.start}) · {path} · convert it") from error
