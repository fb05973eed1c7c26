"""From bytes to uint8 pixels: decoding that distrusts its input, training's crop and evaluation's fixed view.

A training view of a JPEG is cut from a decoding at a reduced scale (`jpeg.py`); everything else, and every JPEG that is
odd, goes through Pillow. Both ways take the same box from the same random numbers and resize alike.
"""

import functools
import io
import warnings
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from diptych.config import Config
from diptych.data import crop, jpeg
from diptych.data.augment import AugmentConfig
from diptych.data.faults import UnusableSample

_MAX_PIXELS = 50_000_000
_THREAD = 8
"""A picture whose sides differ by more than this factor is no picture to resize as a whole."""
_WHITE = (255, 255, 255)
_PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
# Whatever the member is called, it may be any of these. Not all that Pillow knows: for EPS it would run Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "DIB")


@dataclass(frozen=True)
class ImageConfig(Config):
    """How a picture becomes a training view."""

    min_crop: float = 0.9
    """Smallest share of the picture's area that a random crop keeps, in (0, 1]; 1: the whole picture, squeezed."""
    max_aspect: float = 1.333
    """Largest ratio of a crop's sides, at least 1; longer pictures lose of their length before min_crop counts."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Changes of position, colour and background; all off by default."""

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"min_crop must lie in (0, 1], not {self.min_crop}")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1, not {self.max_aspect}")


def picture_extension(names: Container[str]) -> str | None:
    """The member that holds the picture, if there is one."""
    return next((name for name in _PICTURE_EXTENSIONS if name in names), None)


def decode(data: bytes, *, at_least: int | None = None) -> Image.Image:
    """The picture as RGB or, where it has transparency, RGBA; EXIF rotation applied.

    Args:
        at_least: a JPEG may come smaller (libjpeg's reduced scales), but no side below this many pixels.

    Raises:
        UnusableSample: `undecodable`, or `too_large` beyond 50 megapixels (decompression bombs).
    """
    header = jpeg.read_header(data)
    if header is not None:
        _refuse_bombs(header.width, header.height)
        jpeg.refuse_many_scans(data)
        shrink = jpeg.shrink_for(header.width, header.height, at_least=at_least) if at_least else 1
        pixels = jpeg.pixels(data, header, shrink=shrink)
        if pixels is not None:
            return Image.fromarray(crop.upright(pixels, header.orientation))
    return _decode_with_pillow(data)


def training_view(data: bytes, size: int, config: ImageConfig, rng: np.random.Generator) -> np.ndarray:
    """A random crop brought to `size` (bicubic, antialiased); augmentation comes after.

    Returns:
        uint8 [3, size, size], or RGBA [4, size, size] where the picture has transparency; channels last in memory.

    Raises:
        UnusableSample: as from `decode`.
    """
    draws = rng.random(crop.DRAWS).tolist() if config.min_crop < 1 else None
    header = jpeg.read_header(data)
    view = _view_of_jpeg(data, header, size, config, draws) if header is not None else None
    if view is None:
        view = _view_of_picture(_decode_with_pillow(data), size, config, draws)
    return view.transpose(2, 0, 1)


def _box(size: tuple[int, int], config: ImageConfig, draws: list[float] | None) -> crop.Box:
    return crop.whole(size) if draws is None else crop.random_box(size, config.min_crop, config.max_aspect, draws)


def _view_of_jpeg(
    data: bytes, header: jpeg.Header, side: int, config: ImageConfig, draws: list[float] | None
) -> np.ndarray | None:
    """The view [side, side, 3] from a decoding no larger than it needs to be; None where Pillow should look."""
    _refuse_bombs(header.width, header.height)
    jpeg.refuse_many_scans(data)
    size = crop.upright_size(header.width, header.height, header.orientation)
    box = crop.as_stored(_box(size, config, draws), size, header.orientation)
    shrink = jpeg.shrink_for(box[2] - box[0], box[3] - box[1], at_least=side)
    pixels = jpeg.pixels(data, header, shrink=shrink)
    if pixels is None:
        return None
    cut = crop.on_pixels(box, (pixels.shape[1], pixels.shape[0]), shrink=shrink)
    return crop.upright(crop.square(pixels, cut, side), header.orientation)


def _view_of_picture(picture: Image.Image, side: int, config: ImageConfig, draws: list[float] | None) -> np.ndarray:
    """The view [side, side, 3 or 4] of a decoded picture."""
    cut = crop.on_pixels(_box(picture.size, config, draws), picture.size)
    if picture.mode == "RGB" or picture.getchannel("A").getextrema() == (255, 255):
        return crop.square(np.array(picture)[:, :, :3], cut, side)
    # Pillow weighs colours by their opacity, so that nothing shines through from where the picture is transparent.
    return np.array(picture.resize((side, side), Image.Resampling.BICUBIC, box=cut))


def _refuse_bombs(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise UnusableSample("too_large", f"{width}x{height}")


def _decode_with_pillow(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning starts higher than our limit
            picture = Image.open(io.BytesIO(data), formats=_formats())
            _refuse_bombs(picture.width, picture.height)
            if picture.format in ("JPEG", "MPO"):
                jpeg.refuse_many_scans(data)
            picture.load()
            return plain(picture)
    except UnusableSample:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableSample("too_large", str(error)) from error
    except Exception as error:  # a decoder fed with hostile bytes raises whatever it likes
        raise UnusableSample("undecodable", str(error)) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow reads; to ask it for another is an error."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def plain(picture: Image.Image) -> Image.Image:
    """The picture as RGB or, where it has transparency, RGBA; EXIF rotation applied."""
    return _plain_mode(_turned(picture))


def _turned(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a picture is not lost for a broken note beside it
        return picture


def _plain_mode(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGB", "RGBA") and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits and more per pixel: scaled, not cut
        values = np.nan_to_num(np.asarray(picture, dtype=np.float32))
        top = 65535.0 if picture.mode.startswith("I") else max(float(values.max()), 1e-9)
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    transparent = picture.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in picture.info
    return picture.convert("RGBA" if transparent else "RGB")


def flatten(picture: Image.Image, background: tuple[int, int, int] = _WHITE) -> Image.Image:
    """The picture on a plain background; RGB pictures stay as they are."""
    if picture.mode != "RGBA":
        return picture
    canvas = Image.new("RGB", picture.size, background)
    canvas.paste(picture, mask=picture.getchannel("A"))
    return canvas


def to_tensor(picture: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """An RGB picture as a tensor."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class EvaluationView:
    """How an evaluation shows a picture to a model: the transforms of open_clip's evaluation, to the last bit where the
    picture has no transparency (which comes on white) and is not a thread."""

    size: int
    """Side of the view, pixels."""
    squash: bool = False
    """Whether the whole picture is squeezed into the square, or its middle cut out."""
    before_crop: int | None = None
    """The side (the shorter one, unless squashed) to which the picture is brought before its middle is cut out; none:
    `size`."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, picture: Image.Image) -> UInt8[Tensor, "3 size size"]:
        """The view of a decoded picture."""
        picture, size = flatten(picture), self.size
        resized = self.before_crop if self.before_crop is not None else size
        scale = resized / min(picture.size)
        width, height = (resized, resized) if self.squash else (max(resized, int(s * scale)) for s in picture.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        corners = (left, top, left + size, top + size)
        method = Image.Resampling[self.interpolation.upper()]
        if max(width, height) <= _THREAD * resized:
            whole = picture if picture.size == (width, height) else picture.resize((width, height), method)
            return to_tensor(whole.crop(corners))
        # Of a thread only what the crop keeps is resized: the whole of 20000 x 1 pixels would take gigabytes.
        across, down = picture.width / width, picture.height / height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return to_tensor(picture.resize((size, size), method, box=box))


def evaluation_view(picture: Image.Image, size: int) -> UInt8[Tensor, "3 size size"]:
    """Shorter side to `size` (bicubic), centre crop, transparency on white."""
    return EvaluationView(size)(picture)
