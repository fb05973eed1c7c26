"""From bytes to uint8 pixels: decoding that distrusts its input, training's crop and evaluation's fixed view."""

import io
import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from diptych.config import Config
from diptych.data.augment import AugmentConfig
from diptych.data.faults import UnusableSample

_MAX_PIXELS = 50_000_000
_WHITE = (255, 255, 255)
_PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class ImageConfig(Config):
    """How a picture becomes a training view."""

    min_crop: float = 0.9
    """Smallest share of the picture's area that a random crop keeps, in (0, 1]; 1: the whole picture."""
    max_aspect: float = 1.333
    """Largest ratio of a crop's sides, at least 1."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Changes of position, colour and background; all off by default."""

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"min_crop must lie in (0, 1], not {self.min_crop}")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1, not {self.max_aspect}")


def picture_extension(names: object) -> str | None:
    """The member that holds the picture, if there is one."""
    return next((name for name in _PICTURE_EXTENSIONS if name in names), None)  # type: ignore[operator]


def decode(data: bytes, *, at_least: int | None = None) -> Image.Image:
    """The picture as RGB or, where it has transparency, RGBA; EXIF rotation applied.

    Args:
        at_least: a JPEG may come smaller (libjpeg's reduced scales), but no side below this many pixels.

    Raises:
        UnusableSample: `undecodable`, or `too_large` beyond 50 megapixels (decompression bombs).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning starts higher than our limit
            picture = Image.open(io.BytesIO(data))
            if picture.width * picture.height > _MAX_PIXELS:
                raise UnusableSample("too_large", f"{picture.width}x{picture.height}")
            if at_least is not None and picture.format == "JPEG":
                picture.draft("RGB", (at_least, at_least))
            picture.load()
            return _plain_mode(ImageOps.exif_transpose(picture))
    except UnusableSample:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableSample("too_large", str(error)) from error
    except Exception as error:  # a decoder fed with hostile bytes raises whatever it likes
        raise UnusableSample("undecodable", str(error)) from error


def _plain_mode(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGB", "RGBA"):
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits and more per pixel: scaled, not cut
        values = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if picture.mode.startswith("I") else max(float(values.max()), 1e-9)
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    transparent = picture.mode in ("LA", "PA", "RGBa", "La") or "transparency" in picture.info
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


def evaluation_view(picture: Image.Image, size: int) -> UInt8[Tensor, "3 size size"]:
    """Shorter side to `size` (bicubic), centre crop, transparency on white: the transform of open_clip's evaluation."""
    picture = flatten(picture)
    scale = size / min(picture.size)
    width, height = (max(size, int(side * scale)) for side in picture.size)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return to_tensor(picture.crop((left, top, left + size, top + size)))


def training_pixels(picture: Image.Image, size: int, config: ImageConfig, rng: np.random.Generator) -> np.ndarray:
    """A random crop brought to `size` (bicubic, antialiased), as RGBA [4, size, size]; augmentation comes after."""
    box = _random_box(picture.size, config, rng) if config.min_crop < 1 else None
    if picture.size != (size, size) or config.min_crop < 1:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(picture.convert("RGBA")).transpose(2, 0, 1)


def _random_box(
    size: tuple[int, int], config: ImageConfig, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A crop of random area and aspect that fits the picture."""
    width, height = size
    area = width * height * rng.uniform(config.min_crop, 1.0)
    aspect = np.exp(rng.uniform(-1, 1) * np.log(config.max_aspect))
    crop_width = min(float(np.sqrt(area * aspect)), width)
    crop_height = min(area / crop_width, float(height))
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    return (left, top, left + crop_width, top + crop_height)
