"""Pictures made worse in thirteen ways and five degrees.

Kinds and degrees are those of arXiv:1903.12261 (ImageNet-C) where it has them, and as there the picture has 224 pixels
(a square from its middle): noise of one degree is then the same for pictures of any size. It differs from the published
set, which needs OpenCV, ImageMagick, SciPy and scikit-image to be made:

- the shorter side is brought to 224 pixels, not to 256, before the square is cut: models see the same part of a picture
  with and without corruption
- no frost (which needs its photographs), snow, glass blur and elastic transform; `rotation` is ours
- other random numbers: each picture's are drawn from its key alone
- every blur reflects the picture at its edges; defocus is a disk whose edge is smooth by coverage
- pixels are rounded, not cut to whole numbers, and not stored as JPEG
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from PIL import Image

from diptych import seeding
from diptych.data.images import evaluation_view

Kind = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "gaussian_blur",
    "defocus_blur",
    "motion_blur",
    "zoom_blur",
    "fog",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg",
    "rotation",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 224
_Pixels = np.ndarray  # float64 [SIDE, SIDE, 3] in [0, 1]


@dataclass(frozen=True)
class Corruption:
    """A `Change` of pictures (see `diptych_eval.embedder`)."""

    kind: Kind
    severity: int
    """1 to 5."""

    @property
    def name(self) -> str:
        """Kind and degree."""
        return f"{self.kind} {_WAYS[self.kind][1][self.severity - 1]} at {SIDE}"

    def __call__(self, picture: Image.Image, key: str) -> Image.Image:
        """The picture at 224 pixels, made worse."""
        way, degrees = _WAYS[self.kind]
        pixels = evaluation_view(picture, SIDE).permute(1, 2, 0).numpy() / 255.0
        rng = seeding.generator(0, "corruption", self.kind, self.severity, key)
        return _picture(way(pixels, degrees[self.severity - 1], rng))


def _picture(pixels: _Pixels) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


# --- noise -------------------------------------------------------------------------------------------------------


def _gaussian_noise(pixels: _Pixels, deviation: float, rng: np.random.Generator) -> _Pixels:
    return pixels + rng.normal(0, deviation, pixels.shape)


def _shot_noise(pixels: _Pixels, photons: float, rng: np.random.Generator) -> _Pixels:
    return rng.poisson(pixels * photons) / photons


def _impulse_noise(pixels: _Pixels, share: float, rng: np.random.Generator) -> _Pixels:
    """That share of all values becomes 0 or 1."""
    hit, value = rng.random(pixels.shape) < share, rng.integers(0, 2, pixels.shape)
    return np.where(hit, value, pixels)


# --- blur --------------------------------------------------------------------------------------------------------


def _gaussian_blur(pixels: _Pixels, deviation: float, _: np.random.Generator) -> _Pixels:
    places = np.arange(-round(4 * deviation), round(4 * deviation) + 1)
    line = np.exp(-(places**2) / (2 * deviation**2))
    return _convolved(pixels, np.outer(line, line))


def _defocus_blur(pixels: _Pixels, radius: float, _: np.random.Generator) -> _Pixels:
    reach = int(radius) + 1
    places = np.arange(-reach, reach + 1)
    distance = np.hypot(places[:, None], places[None, :])
    return _convolved(pixels, (radius + 0.5 - distance).clip(0, 1))


def _motion_blur(pixels: _Pixels, degree: tuple[int, float], rng: np.random.Generator) -> _Pixels:
    """A tail behind every point, up to 45 degrees off the horizontal, that fades as a Gaussian does."""
    radius, deviation = degree
    angle = np.deg2rad(rng.uniform(-45, 45))
    kernel = np.zeros((4 * radius + 3, 4 * radius + 3))
    for step in range(2 * radius + 1):
        down, across = 2 * radius + 1 + step * np.sin(angle), 2 * radius + 1 + step * np.cos(angle)
        top, left = int(down), int(across)
        weights = np.outer([top + 1 - down, down - top], [left + 1 - across, across - left])
        kernel[top : top + 2, left : left + 2] += np.exp(-(step**2) / (2 * deviation**2)) * weights
    return _convolved(pixels, kernel)


def _zoom_blur(pixels: _Pixels, degree: tuple[float, float], _: np.random.Generator) -> _Pixels:
    """The mean of the picture and of it enlarged by 1, 1 + step, … (below `end`)."""
    end, step = degree
    picture = _picture(pixels)
    factors = np.arange(1, end, step)
    total = pixels.copy()
    for factor in factors:
        cut = SIDE * (1 - 1 / factor) / 2
        box = (cut, cut, SIDE - cut, SIDE - cut)
        total += np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)) / 255.0
    return total / (len(factors) + 1)


def _convolved(pixels: _Pixels, kernel: Float[np.ndarray, "rows columns"]) -> _Pixels:
    """With a kernel of odd sides, brought to a sum of 1; the picture is reflected at its edges."""
    reach = [side // 2 for side in kernel.shape]
    padded = np.pad(pixels, ((reach[0], reach[0]), (reach[1], reach[1]), (0, 0)), "reflect")
    shape = padded.shape[:2]
    spectrum = np.fft.rfft2(kernel / kernel.sum(), shape)[:, :, None]
    whole = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * spectrum, shape, axes=(0, 1))
    return whole[2 * reach[0] :, 2 * reach[1] :]


# --- weather and light -------------------------------------------------------------------------------------------


def _fog(pixels: _Pixels, degree: tuple[float, float], rng: np.random.Generator) -> _Pixels:
    """Clouds laid over, of that density, and all dimmed to the brightness there was."""
    density, decay = degree
    clouds = _plasma(decay, rng)[:SIDE, :SIDE, None]
    most = pixels.max()
    return (pixels + density * clouds) * most / (most + density)


def _plasma(decay: float, rng: np.random.Generator) -> Float[np.ndarray, "256 256"]:
    """A fractal in [0, 1] that closes on itself: each halving of the grid adds noise that is decay² times smaller."""
    grid, amplitude = np.zeros((1, 1)), 1.0
    while len(grid) < 256:
        right, below = np.roll(grid, -1, 1), np.roll(grid, -1, 0)
        noise = amplitude * rng.uniform(-1, 1, (3, *grid.shape))
        middle = (grid + right + below + np.roll(right, -1, 0)) / 4 + noise[0]
        finer = np.empty((2 * len(grid), 2 * len(grid)))
        finer[::2, ::2], finer[1::2, 1::2] = grid, middle
        finer[::2, 1::2] = (grid + right + middle + np.roll(middle, 1, 0)) / 4 + noise[1]
        finer[1::2, ::2] = (grid + below + middle + np.roll(middle, 1, 1)) / 4 + noise[2]
        grid = finer
        amplitude /= decay**2
    return (grid - grid.min()) / (grid.max() - grid.min())


def _brightness(pixels: _Pixels, more: float, _: np.random.Generator) -> _Pixels:
    """More value (of hue, saturation, value)."""
    value = pixels.max(2, keepdims=True)
    new = (value + more).clip(0, 1)
    return np.where(value > 0, pixels * new / np.where(value > 0, value, 1), new)


def _contrast(pixels: _Pixels, kept: float, _: np.random.Generator) -> _Pixels:
    """That share of each value's distance from its channel's mean."""
    mean = pixels.mean((0, 1))
    return (pixels - mean) * kept + mean


# --- storage and position ----------------------------------------------------------------------------------------


def _pixelate(pixels: _Pixels, scale: float, _: np.random.Generator) -> _Pixels:
    small = int(SIDE * scale)
    picture = _picture(pixels).resize((small, small), Image.Resampling.BOX)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255.0


def _jpeg(pixels: _Pixels, quality: int, _: np.random.Generator) -> _Pixels:
    buffer = io.BytesIO()
    _picture(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)) / 255.0


def _rotation(pixels: _Pixels, degrees: float, rng: np.random.Generator) -> _Pixels:
    """To either side; corners become white."""
    angle = degrees * rng.choice([-1, 1])
    turned = _picture(pixels).rotate(angle, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    return np.asarray(turned) / 255.0


_Way = Callable[[_Pixels, Any, np.random.Generator], _Pixels]
_WAYS: dict[Kind, tuple[_Way, tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
    "defocus_blur": (_defocus_blur, (3, 4, 6, 8, 10)),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (_zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.33, 0.03))),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
    "rotation": (_rotation, (5, 10, 20, 30, 45)),
}
