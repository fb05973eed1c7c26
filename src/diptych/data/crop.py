"""Where a training view is cut from its picture, and how what is cut becomes a square of the right size."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; pixels."""
Cut = tuple[int, int, int, int]
"""The same on whole pixels."""

DRAWS = 4
_FLIPS = {1: (False, False), 2: (True, False), 3: (True, True), 4: (False, True)}
_FLIPS |= {orientation + 4: (_FLIPS[orientation][0], _FLIPS[orientation][1]) for orientation in (1, 2, 3, 4)}
_SIDEWAYS = (5, 6, 7, 8)


def random_box(size: tuple[int, int], min_crop: float, max_aspect: float, draws: Sequence[float]) -> Box:
    """A box of random area, aspect and place.

    Of the largest box that fits the picture and is no longer than `max_aspect`, the share that is kept is uniform from
    `min_crop` to 1; the logarithm of the aspect is uniform over what fits then: torchvision's RandomResizedCrop, which
    draws until something fits, without the drawing.

    Args:
        size: width and height of the picture.
        draws: `DRAWS` uniform numbers in [0, 1).
    """
    width, height = size
    widest, highest = min(width, height * max_aspect), min(height, width * max_aspect)
    share = min_crop + (1 - min_crop) * draws[0]
    natural = widest / highest
    lowest, largest = max(1 / max_aspect, natural * share), min(max_aspect, natural / share)
    aspect = lowest * (largest / lowest) ** draws[1]
    area = share * widest * highest
    box_width = min(math.sqrt(area * aspect), widest)
    box_height = min(area / box_width, highest)
    left, top = draws[2] * (width - box_width), draws[3] * (height - box_height)
    return (left, top, left + box_width, top + box_height)


def whole(size: tuple[int, int]) -> Box:
    """The box that is the picture."""
    return (0.0, 0.0, float(size[0]), float(size[1]))


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Width and height of a stored picture once it is turned as EXIF says."""
    return (height, width) if orientation in _SIDEWAYS else (width, height)


def as_stored(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Where a box of the upright picture lies in the stored one.

    Args:
        size: width and height of the upright picture.
    """
    left, top, right, bottom = box
    mirror, flip = _FLIPS[orientation]
    if mirror:
        left, right = size[0] - right, size[0] - left
    if flip:
        top, bottom = size[1] - bottom, size[1] - top
    return (top, left, bottom, right) if orientation in _SIDEWAYS else (left, top, right, bottom)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels [height, width, channels] turned as EXIF says."""
    if orientation == 1:
        return pixels
    mirror, flip = _FLIPS[orientation]
    turned = pixels.transpose(1, 0, 2) if orientation in _SIDEWAYS else pixels
    return np.ascontiguousarray(turned[:: -1 if flip else 1, :: -1 if mirror else 1])


def on_pixels(box: Box, size: tuple[int, int], *, shrink: int = 1) -> Cut:
    """The box on whole pixels of a picture of which each stands for `shrink` x `shrink`; at least one pixel.

    Args:
        size: width and height of the shrunken picture.
    """
    left = min(round(box[0] / shrink), size[0] - 1)
    top = min(round(box[1] / shrink), size[1] - 1)
    right = min(max(round(box[2] / shrink), left + 1), size[0])
    bottom = min(max(round(box[3] / shrink), top + 1), size[1])
    return (left, top, right, bottom)


def square(pixels: np.ndarray, cut: Cut, side: int) -> np.ndarray:
    """What is cut from RGB pixels [height, width, 3], as [side, side, 3] (bicubic, antialiased, all in uint8)."""
    left, top, right, bottom = cut
    part = np.ascontiguousarray(pixels[top:bottom, left:right])
    if part.shape[:2] == (side, side):
        return part
    # unsqueeze, not NumPy's newaxis: torch's vector code needs the strides of a channels-last batch, of one here.
    batch = torch.from_numpy(part).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(batch, (side, side), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
