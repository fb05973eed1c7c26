"""A row's picture as it goes into the shard: read with a limit, decoded to be sure of it, shrunk where asked."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diptych.data.faults import UnusableSample
from diptych.data.images import decode

_MAX_BYTES = 1 << 27
_MAGIC = (
    ("jpg", 0, b"\xff\xd8\xff"),
    ("png", 0, b"\x89PNG\r\n\x1a\n"),
    ("webp", 8, b"WEBP"),
    ("gif", 0, b"GIF8"),
    ("bmp", 0, b"BM"),
    ("tif", 0, b"II*\0"),
    ("tif", 0, b"MM\0*"),
)


@dataclass(frozen=True)
class Shrink:
    """How large pictures become smaller."""

    max_side: int
    quality: int


@dataclass(frozen=True)
class Encoded:
    """A member of a shard."""

    extension: str
    """Told by the bytes, whatever the file was called."""
    data: bytes


def encode(picture: Path | bytes, shrink: Shrink | None) -> Encoded:
    """A picture's own bytes, or new ones where it is larger than wanted.

    Raises:
        UnusableSample: `no_picture`, `unreadable`, `too_large` (128 MiB or 50 megapixels), `undecodable`, or
            `unsupported`, a format that shards do not hold.
    """
    data = _read(picture) if isinstance(picture, Path) else picture
    if len(data) > _MAX_BYTES:
        raise UnusableSample("too_large", f"more than {_MAX_BYTES} bytes")
    decoded = decode(data)
    if shrink is not None and max(decoded.size) > shrink.max_side:
        return _shrunk(decoded, shrink)
    for extension, start, magic in _MAGIC:
        if data.startswith(magic, start):
            return Encoded(extension, data)
    raise UnusableSample("unsupported", "neither JPEG, PNG, WebP, GIF, BMP nor TIFF")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_BYTES:
                raise UnusableSample("too_large", f"{size} bytes")
            return file.read(_MAX_BYTES + 1)  # it may have grown
    except FileNotFoundError as error:
        raise UnusableSample("no_picture", "there is no such file") from error
    except OSError as error:
        raise UnusableSample("unreadable", str(error.strerror)) from error


def _shrunk(picture: Image.Image, shrink: Shrink) -> Encoded:
    scale = shrink.max_side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    smaller = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if picture.mode == "RGBA":  # JPEG has no transparency
        smaller.save(buffer, "WEBP", quality=shrink.quality)
        return Encoded("webp", buffer.getvalue())
    smaller.save(buffer, "JPEG", quality=shrink.quality)
    return Encoded("jpg", buffer.getvalue())
