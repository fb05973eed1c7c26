"""Image towers on pictures of other sizes than they were built for, their parameters as they are.

Convolutions take any size. Where each place of a grid has a learned positional embedding, those of another grid are
made from it at each forward pass, as open_clip makes them when it loads weights (bicubic, antialiased); the gradient
goes back through that. At the size that a tower was built for nothing is different.
"""

from collections.abc import Iterable
from math import isqrt
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import VisionTransformer
from timm.layers.format import Format
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from diptych.errors import ConfigError, one_line

Grid = tuple[int, int]
"""Rows and columns."""


def accept_sizes(tower: nn.Module, sizes: Iterable[int]) -> None:
    """Lets a tower take square pictures of these sizes too, and tries each.

    Raises:
        ConfigError: it cannot.
    """
    for module in tower.modules():
        # Bound methods, not closures: a deep copy of the tower (the averaged model) gets its own.
        if isinstance(module, VisionTransformer):
            module._embeds = MethodType(_embeds, module)
        elif isinstance(module, AttentionPool2d):
            module.forward = MethodType(_pool, module)
        elif isinstance(module, TimmVisionTransformer | Eva):
            _accept_in_timm(module)
    for size in sizes:
        _try(tower, size)


def _accept_in_timm(trunk: TimmVisionTransformer | Eva) -> None:
    """What timm's own `dynamic_img_size` sets when a model is built; open_clip has no way to ask for it."""
    if isinstance(trunk.patch_embed, PatchEmbed | HybridEmbed):
        trunk.dynamic_img_size = True  # type: ignore[misc]  # final for TorchScript's sake
        trunk.patch_embed.strict_img_size = False
        trunk.patch_embed.flatten, trunk.patch_embed.output_fmt = False, Format.NHWC


@torch.no_grad()
def _try(tower: nn.Module, size: int) -> None:
    """Raises ConfigError where a picture of this size does not go through."""
    was_training = tower.training
    parameter = next(tower.parameters())
    try:
        tower.eval()(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the image tower takes no pictures of {size} x {size} pixels ({one_line(error, 200)}) · stages · "
            "choose another image_size"
        ) from error
    finally:
        tower.train(was_training)


class OtherPositions:
    """A module as its own code sees it, with another positional embedding."""

    def __init__(self, module: nn.Module, positional_embedding: Tensor) -> None:
        self._module, self.positional_embedding = module, positional_embedding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _embeds(tower: VisionTransformer, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B tokens W"]:
    """In place of the vision transformer's own."""
    height, width = images.shape[-2:]
    if (height, width) == tower.image_size:  # which need be no multiple of the patch size
        return VisionTransformer._embeds(tower, images)
    down, across = tower.patch_size
    if height % down or width % across:
        raise ValueError(f"no multiple of the patch size, {down}")
    positions = resampled(tower.positional_embedding, tower.grid_size, (height // down, width // across))
    return VisionTransformer._embeds(OtherPositions(tower, positions), images)


def _pool(pool: AttentionPool2d, features: Float[Tensor, "B W height width"]) -> Float[Tensor, "B D"]:
    """In place of the attention pooling's own `forward`."""
    side = isqrt(len(pool.positional_embedding) - 1)
    grid = (features.shape[-2], features.shape[-1])
    if grid == (side, side):
        return AttentionPool2d.forward(pool, features)
    positions = resampled(pool.positional_embedding, (side, side), grid)
    return AttentionPool2d.forward(OtherPositions(pool, positions), features)


def resampled(positions: Float[Tensor, "places W"], grid: Grid, new: Grid) -> Float[Tensor, "new_places W"]:
    """The positional embedding for another grid; the first place, the class token's, belongs to none and stays."""
    with torch.autocast(positions.device.type, enabled=False):
        # Resampling is linear. As a product, because backward of `interpolate` adds in no fixed order on CUDA.
        units = torch.eye(grid[0] * grid[1], device=positions.device).unflatten(1, (1, *grid))
        weights = F.interpolate(units, new, mode="bicubic", antialias=True, align_corners=False).flatten(1)
        return torch.cat([positions[:1], (weights.T @ positions[1:].float()).to(positions.dtype)])
