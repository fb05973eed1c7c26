"""Optional augmentations of a training view. To add one: a field that turns it on, a function, a line in `augment`.

All of them act on one small picture in a loader worker and draw from the generator they are given, so a sample's view
depends on (seed, epoch, lane, position) alone.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from diptych.config import Config

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class AugmentConfig(Config):
    """Which changes are made, and how strong they are. Everything is off by default."""

    flip: float = 0.0
    """Probability of a left-right mirror. Captions that speak of left and right do not survive it."""
    rotate: float = 0.0
    """Largest rotation, degrees."""
    zoom: float = 0.0
    """Largest relative change of size: 0.2 draws from 0.8 to 1.2."""
    stretch: float = 0.0
    """Largest relative change of the aspect ratio."""
    shear: float = 0.0
    """Largest shear, as a fraction of the side."""
    shift: float = 0.0
    """Largest displacement, as a fraction of the side."""
    background: float = 0.0
    """Probability that transparent parts lie on a random colour instead of white."""
    brightness: float = 0.0
    """Largest relative change."""
    contrast: float = 0.0
    """Largest relative change, around the picture's mean."""
    saturation: float = 0.0
    """Largest relative change."""
    hue: float = 0.0
    """Largest rotation of the colours around the grey axis, in turns (0.5 reaches every hue)."""
    grey: float = 0.0
    """Probability that all colour is taken out."""
    invert: float = 0.0
    """Probability of the negative."""
    blur: float = 0.0
    """Probability of a Gaussian blur with radius up to a fortieth of the side."""
    noise: float = 0.0
    """Largest standard deviation of pixel noise, as a fraction of the range."""
    erase: float = 0.0
    """Probability that a rectangle of up to a ninth of the picture is filled with one colour."""

    def __post_init__(self) -> None:
        for name in ("flip", "background", "grey", "invert", "blur", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], not {getattr(self, name)}")


def augment(picture: Image.Image, config: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """The changed picture, RGB, of the same size."""
    picture = _move(picture, config, rng)
    if config.blur and rng.random() < config.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0) * picture.width / 40))
    pixels = np.asarray(picture, dtype=np.float32) / 255
    if pixels.shape[-1] == 4:
        pixels = _on_background(pixels, config, rng)
    pixels = _recolour(pixels, config, rng)
    if config.noise:
        pixels = pixels + rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(0, config.noise))
    if config.erase and rng.random() < config.erase:
        pixels = _erase(pixels, rng)
    return Image.fromarray((pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def _move(picture: Image.Image, config: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """Mirror, rotation, size, aspect, shear and displacement as one affine resampling."""
    if not any((config.flip, config.rotate, config.zoom, config.stretch, config.shear, config.shift)):
        return picture
    side = picture.width
    angle = np.deg2rad(rng.uniform(-1, 1) * config.rotate)
    zoom = 1 + rng.uniform(-1, 1) * config.zoom
    aspect = np.sqrt(1 + rng.uniform(0, 1) * config.stretch) ** rng.choice([-1, 1])
    mirror = -1.0 if rng.random() < config.flip else 1.0
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, rng.uniform(-1, 1) * config.shear], [0, 1]])
    inverse = np.linalg.inv(turn @ shear @ np.diag([mirror * zoom * aspect, zoom / aspect]))
    centre = np.array([(side - 1) / 2 + 0.5] * 2)
    offset = centre - inverse @ (centre + rng.uniform(-1, 1, 2) * config.shift * side)
    matrix = (inverse[0, 0], inverse[0, 1], offset[0], inverse[1, 0], inverse[1, 1], offset[1])
    fill = None if picture.mode == "RGBA" else _border_colour(picture)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)


def _border_colour(picture: Image.Image) -> tuple[int, ...]:
    """What uncovered corners of an opaque picture are filled with: its own corner."""
    colour = picture.getpixel((0, 0))
    return colour if isinstance(colour, tuple) else (int(colour or 0),) * 3


def _on_background(pixels: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    colour = np.ones(3, dtype=np.float32)
    if config.background and rng.random() < config.background:
        colour = rng.random(3, dtype=np.float32)
    alpha = pixels[..., 3:]
    return pixels[..., :3] * alpha + colour * (1 - alpha)


def _recolour(pixels: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Saturation, hue, contrast and brightness as one 3×3 matrix and one offset; grey and negative after them."""
    matrix, offset = np.eye(3, dtype=np.float32), np.zeros(3, dtype=np.float32)
    if config.hue:
        matrix = _hue_rotation(rng.uniform(-1, 1) * config.hue * 2 * np.pi) @ matrix
    keep = 1 + rng.uniform(-1, 1) * config.saturation
    if config.grey and rng.random() < config.grey:
        keep = 0.0
    matrix = (keep * np.eye(3, dtype=np.float32) + (1 - keep) * _LUMA[None, :]) @ matrix
    if config.contrast:
        gain = 1 + rng.uniform(-1, 1) * config.contrast
        mean = float(pixels.mean())
        matrix, offset = matrix * gain, offset + mean * (1 - gain)
    if config.brightness:
        gain = 1 + rng.uniform(-1, 1) * config.brightness
        matrix, offset = matrix * gain, offset * gain
    if config.invert and rng.random() < config.invert:
        matrix, offset = -matrix, 1 - offset
    return (pixels @ matrix.T.astype(np.float32) + offset.astype(np.float32)).clip(0, 1)


def _hue_rotation(angle: float) -> np.ndarray:
    """Rotation of RGB around the grey axis (Rodrigues' formula)."""
    cosine, sine = np.cos(angle), np.sin(angle) / np.sqrt(3)
    third = (1 - cosine) / 3
    return np.array(
        [
            [cosine + third, third - sine, third + sine],
            [third + sine, cosine + third, third - sine],
            [third - sine, third + sine, cosine + third],
        ],
        dtype=np.float32,
    )


def _erase(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = pixels.shape[0]
    height, width = rng.integers(side // 8, side // 3 + 1, 2)
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    pixels = pixels.copy()
    pixels[top : top + height, left : left + width] = rng.random(3, dtype=np.float32)
    return pixels
