"""Optional augmentations of training views, a batch at a time. To add one: a field, the numbers it draws, a function.

Every view is a pure function of its picture and of `DRAWS` uniform numbers, drawn from a generator that is keyed by the
sample's place in the order; so views do not depend on which worker makes them or what else is in its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from diptych.config import Config

DRAWS = 26
_LUMA = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class AugmentConfig(Config):
    """Which changes are made, and how strong they are. Everything is off by default."""

    flip: float = 0.0
    """Probability of a left-right mirror. Captions that speak of left and right do not survive it."""
    rotate: float = 0.0
    """Largest rotation, degrees."""
    enlarge: float = 0.0
    """Largest relative growth: sizes are drawn from 1 - shrink to 1 + enlarge."""
    shrink: float = 0.0
    """Largest relative reduction, below 1."""
    stretch: float = 0.0
    """Largest relative change of the aspect ratio."""
    shear: float = 0.0
    """Largest shear, as a fraction of the side."""
    shift: float = 0.0
    """Largest displacement, as a fraction of the side."""
    background: float = 0.0
    """Probability that transparent parts, and corners uncovered by a move, lie on a random colour instead of white."""
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
    outline: float = 0.0
    """Probability that edges are inked, as in a line drawing."""
    blur: float = 0.0
    """Probability of a blur of up to one pixel."""
    erase: float = 0.0
    """Probability that a rectangle of up to a ninth of the picture is filled with one colour."""

    def __post_init__(self) -> None:
        for name in ("flip", "background", "grey", "invert", "outline", "blur", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], not {getattr(self, name)}")
        if not 0 <= self.shrink < 1 or self.enlarge < 0:
            raise ValueError(f"shrink must lie in [0, 1), not {self.shrink}; enlarge at 0 or above, not {self.enlarge}")

    @property
    def active(self) -> bool:
        """Whether anything is turned on."""
        return self != AugmentConfig()


def draw(rng: np.random.Generator) -> np.ndarray:
    """The numbers in [0, 1) that decide one view."""
    return rng.random(DRAWS, dtype=np.float32)


def augment_all(
    pixels: Sequence[np.ndarray], draws: np.ndarray, config: AugmentConfig
) -> UInt8[Tensor, "n 3 side side"]:
    """The views side by side on an opaque background, changed where anything is turned on.

    Args:
        pixels: uint8 [3, side, side], or RGBA [4, side, side] where transparent; at least one.
        draws: uniform in [0, 1), [n, DRAWS], from `draw`.

    Returns:
        The batch; channels last in memory where nothing is changed.
    """
    if not config.active:
        return _side_by_side(pixels)
    rgba = np.full((len(pixels), 4, *pixels[0].shape[1:]), 255, dtype=np.uint8)
    for row, picture in zip(rgba, pixels, strict=True):
        row[: len(picture)] = picture
    return augment(torch.from_numpy(rgba), torch.from_numpy(draws), config)


def _side_by_side(pixels: Sequence[np.ndarray]) -> UInt8[Tensor, "n 3 side side"]:
    """Transparent ones on white. Channels stay last in memory: so decoders leave them and so models take them."""
    batch = np.empty((len(pixels), *pixels[0].shape[1:], 3), dtype=np.uint8)
    for row, picture in zip(batch, pixels, strict=True):
        row[...] = (picture if len(picture) == 3 else _on_white(picture)).transpose(1, 2, 0)
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[3:].astype(np.uint16)
    return ((rgba[:3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def augment(
    pictures: UInt8[Tensor, "n 4 side side"], draws: Float[Tensor, "n draws"], config: AugmentConfig
) -> UInt8[Tensor, "n 3 side side"]:
    """The changed views on an opaque background.

    Args:
        pictures: RGBA; opaque pictures have alpha 255.
        draws: uniform in [0, 1), from `draw`.
    """
    u = iter(draws.unbind(1))
    pixels = pictures.float() / 255
    pixels = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)  # premultiplied, so that edges do not bleed
    pixels = _move(pixels, config, [next(u) for _ in range(7)])
    view = _on_background(pixels, config, torch.stack([next(u) for _ in range(4)], 1))
    view = _recolour(view, config, [next(u) for _ in range(6)])
    view = _blur(view, config, next(u), next(u))
    view = _erase(view, config, torch.stack([next(u) for _ in range(5)], 1))
    view = _outline(view, config, next(u), next(u))
    return (view.clamp_(0, 1) * 255 + 0.5).to(torch.uint8)


def _signed(u: Tensor, largest: float) -> Tensor:
    return (2 * u - 1) * largest


def _move(pixels: Tensor, config: AugmentConfig, u: list[Tensor]) -> Tensor:
    """Mirror, rotation, size, aspect, shear and displacement as one affine resampling."""
    if not any((config.flip, config.rotate, config.enlarge, config.shrink, config.stretch, config.shear, config.shift)):
        return pixels
    angle = torch.deg2rad(_signed(u[0], config.rotate))
    zoom = 1 - config.shrink + u[1] * (config.shrink + config.enlarge)
    aspect = torch.exp(_signed(u[2], float(np.log1p(config.stretch)) / 2))
    mirror = torch.where(u[3] < config.flip, -1.0, 1.0)
    shear = _signed(u[4], config.shear)
    cosine, sine, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    # What is given is where each output pixel comes from, so sizes are inverse.
    scale = torch.stack(
        [
            torch.stack([mirror / (zoom * aspect), shear], 1),
            torch.stack([zero, aspect / zoom], 1),
        ],
        1,
    )
    shift = torch.stack([_signed(u[5], 2 * config.shift), _signed(u[6], 2 * config.shift)], 1)
    matrix = torch.cat([scale @ turn, shift[:, :, None]], 2)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _on_background(pixels: Tensor, config: AugmentConfig, u: Tensor) -> Tensor:
    colour = torch.where(u[:, :1] < config.background, u[:, 1:], 1.0)
    return pixels[:, :3] + colour[:, :, None, None] * (1 - pixels[:, 3:])


def _recolour(view: Tensor, config: AugmentConfig, u: list[Tensor]) -> Tensor:
    """Hue, saturation or grey, contrast, brightness and negative as one 3x3 matrix and one offset per picture."""
    if not any((config.hue, config.saturation, config.grey, config.contrast, config.brightness, config.invert)):
        return view
    keep = torch.where(u[2] < config.grey, 0.0, 1 + _signed(u[1], config.saturation))[:, None, None]
    matrix = (keep * torch.eye(3) + (1 - keep) * _LUMA.expand(3, 3)) @ _hue_rotation(_signed(u[0], config.hue))
    gain = (1 + _signed(u[3], config.contrast)) * (1 + _signed(u[4], config.brightness))
    mean = view.mean((1, 2, 3))
    offset = mean * (1 + _signed(u[4], config.brightness)) - mean * gain
    sign = torch.where(u[5] < config.invert, -1.0, 1.0)
    matrix = matrix * (sign * gain)[:, None, None]
    offset = torch.where(sign < 0, 1 - offset, offset)
    return torch.baddbmm(offset[:, None, None], matrix, view.flatten(2)).view_as(view).clamp_(0, 1)


def _hue_rotation(turns: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    """Rotation of RGB around the grey axis (Rodrigues' formula)."""
    cosine, sine = torch.cos(2 * torch.pi * turns), torch.sin(2 * torch.pi * turns) / 3**0.5
    third = (1 - cosine) / 3
    same, up, down = cosine + third, third + sine, third - sine
    rows = [[same, down, up], [up, same, down], [down, up, same]]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _outline(view: Tensor, config: AugmentConfig, chance: Tensor, amount: Tensor) -> Tensor:
    """Darkens each pixel by the range of brightness around it (a morphological gradient of 3 x 3 pixels)."""
    if not config.outline:
        return view
    rows = (chance < config.outline).nonzero()[:, 0]
    if len(rows):
        plain = view[rows]
        luma = torch.einsum("nchw,c->nhw", plain, _LUMA)[:, None]
        edge = F.max_pool2d(luma, 3, 1, 1) + F.max_pool2d(-luma, 3, 1, 1)
        ink = (edge * (1 + 3 * amount[rows, None, None, None])).clamp_(max=1)
        view[rows] = plain * (1 - ink)
    return view


def _blur(view: Tensor, config: AugmentConfig, chance: Tensor, amount: Tensor) -> Tensor:
    if not config.blur:
        return view
    rows = (chance < config.blur).nonzero()[:, 0]
    if len(rows):
        sharp = view[rows]
        soft = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        view[rows] = torch.lerp(sharp, soft, amount[rows, None, None, None])
    return view


def _erase(view: Tensor, config: AugmentConfig, u: Tensor) -> Tensor:
    if not config.erase:
        return view
    side = view.shape[-1]
    for row in (u[:, 0] < config.erase).nonzero()[:, 0].tolist():
        chance, width, height, left, top = u[row].tolist()
        columns, rows = int(side * (0.1 + 0.23 * width)), int(side * (0.1 + 0.23 * height))
        x, y = int(left * (side - columns)), int(top * (side - rows))
        # The number that chose this row is uniform below the probability: spread out again, it is the colour.
        view[row, :, y : y + rows, x : x + columns] = torch.tensor([chance / config.erase, left, width])[:, None, None]
    return view
