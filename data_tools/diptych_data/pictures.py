"""What a sample's picture and texts are, without decoding more than is asked for."""

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from diptych.data import captions
from diptych.data.faults import UnusableSample
from diptych.data.images import picture_extension

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Header:
    """What the first bytes of a picture say."""

    format: str
    mode: str
    width: int
    height: int
    """As shown: EXIF rotation applied."""

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def aspect(self) -> float:
        """The longer side over the shorter."""
        return max(self.width, self.height) / max(min(self.width, self.height), 1)


def picture_bytes(members: Mapping[str, bytes]) -> bytes:
    """The member that is the picture.

    Raises:
        UnusableSample: `no_picture`.
    """
    extension = picture_extension(members)
    if extension is None:
        raise UnusableSample("no_picture")
    return members[extension]


def header(data: bytes) -> Header:
    """Size and kind of a picture, without its pixels.

    Raises:
        UnusableSample: `undecodable`, or `too_large` for what Pillow takes for a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data))
            # A PNG keeps its EXIF behind the pixels: asking for it would decode them.
            orientation = picture.getexif().get(_ORIENTATION, 1) if "exif" in picture.info else 1
    except Image.DecompressionBombError as error:
        raise UnusableSample("too_large", str(error)) from error
    except Exception as error:  # a decoder fed with hostile bytes raises whatever it likes
        raise UnusableSample("undecodable", str(error)) from error
    width, height = picture.size[::-1] if orientation in _SIDEWAYS else picture.size
    return Header(picture.format or "?", picture.mode, width, height)


def texts(members: Mapping[str, bytes]) -> dict[str, list[str]]:
    """The captions of a sample by column, blank ones left out.

    Raises:
        UnusableSample: `bad_caption`, the bytes are no UTF-8 or no JSON map.
    """
    columns = captions.read(members)
    return {
        _storable(column): kept
        for column, found in columns.items()
        if (kept := [_storable(text) for text in found if text.strip()])
    }


def _storable(text: str) -> str:
    """JSON can bring halves of surrogate pairs, which no file or page can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def first_text(members: Mapping[str, bytes], column: str | None = None) -> str:
    """The caption that stands for a sample: the first of `column`; none: of the .txt member, else of any column.

    Raises:
        UnusableSample: `no_caption` or `bad_caption`.
    """
    found = texts(members)
    if column is None:
        column = "txt" if "txt" in found else next(iter(found), "")
    if column not in found:
        raise UnusableSample("no_caption")
    return captions.clean(found[column][0])
