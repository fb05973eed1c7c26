"""The fast way with JPEG: header, orientation, and pixels at a reduced scale, by libjpeg-turbo through simplejpeg.

Only halvings are used. libjpeg decodes at 3/8, 5/8, 6/8 and 7/8 too, but has no vector code for these: 3/8 takes longer
than 4/8, and each of the others longer than the full size (`diptych bench data --measures decoders`). What this decoder
has doubts about it leaves to Pillow by returning None; what is cut off or visibly damaged it refuses, where Pillow
would fill the rest with grey.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from diptych.data.faults import UnusableSample

_SHRINK = (8, 4, 2, 1)
_ORIENTATION = 0x0112
_EXIF, _XMP = b"Exif\x00\x00", b"http://ns.adobe.com/xap/1.0/\x00"
_APP1, _SCAN, _END = 0xE1, 0xDA, 0xD9
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_COLOURS = ("YCbCr", "Gray", "RGB")
_MAX_SEGMENTS = 256
_MAX_SCANS = 64
"""Encoders write about ten. Each may repaint the whole picture from a few bytes, so thousands are an attack."""


@dataclass(frozen=True)
class Header:
    """What stands before the pixels."""

    width: int
    height: int
    """As stored, before rotation."""
    orientation: int
    """1 to 8, as EXIF counts them."""


def is_jpeg(data: bytes) -> bool:
    """Whether the bytes begin as a JPEG does."""
    return data[:3] == b"\xff\xd8\xff"


def read_header(data: bytes) -> Header | None:
    """Size and orientation; None where Pillow should look (no JPEG, CMYK, something unusual).

    Raises:
        UnusableSample: `undecodable`, an absurd number of scans.
    """
    if not is_jpeg(data):
        return None
    orientation = _orientation(data)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if orientation is None or colours not in _COLOURS or min(width, height) < 1:
        return None
    return Header(width, height, orientation)


def shrink_for(width: float, height: float, *, at_least: int) -> int:
    """The largest of 8, 4, 2, 1 by which the sides may be divided with none below `at_least`; 1 for small pictures."""
    return next((by for by in _SHRINK if min(width, height) >= by * at_least), 1)


def pixels(data: bytes, header: Header, *, shrink: int = 1) -> np.ndarray | None:
    """RGB [height, width, 3] as stored, the sides divided by `shrink` and rounded up; None where Pillow should look.

    Raises:
        UnusableSample: `undecodable`, the data ends early or is damaged.
    """
    try:
        return simplejpeg.decode_jpeg(
            data,
            min_width=-(-header.width // shrink),
            min_height=-(-header.height // shrink),
            min_factor=shrink,
            strict=True,
        )
    except ValueError as error:
        if "remature end" in str(error) or "Huffman" in str(error):
            raise UnusableSample("undecodable", str(error)) from error
        return None  # such as stray bytes before a marker, which do no harm


def refuse_many_scans(data: bytes) -> None:
    """Raises UnusableSample `undecodable` for a progressive JPEG of absurdly many scans, before any is decoded."""
    progressive = any(marker in _PROGRESSIVE for marker, _, _ in _segments(data))
    # Within scans 0xFF is always followed by 0x00, so this pair is a scan's beginning (or lies in a thumbnail).
    if progressive and (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
        raise UnusableSample("undecodable", f"{scans} progressive scans")


def _orientation(data: bytes) -> int | None:
    """As EXIF says; 1 where nothing is said or what is said is broken; None where only Pillow knows."""
    found = None
    for marker, start, end in _segments(data):
        if marker != _APP1:
            continue
        if data.startswith(_EXIF, start):
            if found is not None:
                return None
            found = _exif_orientation(data[start:end])
        elif data.startswith(_XMP, start) and data.find(b"tiff:Orientation", start, end) >= 0:
            return None
    return found if found is not None else 1


def _exif_orientation(segment: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(segment)
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # hostile bytes; a picture is not lost for a broken note beside it
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, first byte and end of each segment before the first scan."""
    place = 2
    for _ in range(_MAX_SEGMENTS):
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        if place + 4 > len(data) or data[place] != 0xFF or data[place + 1] in (_SCAN, _END):
            return
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        yield data[place + 1], place + 4, end
        place = end
