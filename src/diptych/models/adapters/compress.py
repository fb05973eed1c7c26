"""A base whose frozen weights are kept in eight bits, or in four."""

import logging
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from diptych.distributed import sharding
from diptych.errors import ConfigError
from diptych.models.adapters.attention import unpack
from diptych.models.adapters.family import Adapter

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_BLOCK, _SCALES_BLOCK = 64, 256
"""Weights that share a scale in NF4, and scales that share one of theirs (arXiv:2305.14314, section 3)."""


@dataclass(frozen=True)
class Compress(Adapter, name="compress"):
    """The linear layers of a tower that are not trained in int8 with a scale per row, through torchao: a quarter of
    their memory; or in NF4, an eighth.

    What learns on top (LoRA, prompts) stays in float32, and so do layers that `unfrozen` names; name this before it.
    One process only. Checkpoints hold the weights as they are computed with, in float32: opened again, the model is a
    plain one with the same features.
    """

    tower: Literal["image", "text", "both"] = "both"
    """Whose layers."""
    bits: Literal[8, 4] = 8
    """4: each weight is one of sixteen numbers (NF4), with a scale for 64 weights (QLoRA, arXiv:2305.14314). Slower:
    each pass makes float32 of the weights, layer by layer."""

    def apply(self, model: "DualEncoder") -> None:
        """See Adapter. Raises ConfigError where torchao is missing, all layers are trained, or one does not fit."""
        for name in ("image_tower", "text_tower") if self.tower == "both" else (f"{self.tower}_tower",):
            tower = getattr(model, name)
            unpack(tower)  # packed attention is no linear layer
            layers = {path: module for path, module in tower.named_modules() if isinstance(module, nn.Linear)}
            frozen = {path: module for path, module in layers.items() if not module.weight.requires_grad}
            if not frozen:
                raise ConfigError(
                    f"all linear layers of {name} are to be trained, and compressed weights cannot · model.unfrozen · "
                    "leave some out, or do not compress this tower"
                )
            for path, layer in frozen.items():
                if self.bits == 8:
                    _to_int8(layer)
                else:
                    _to_nf4(layer, f"{name}.{path}")


def _torchao() -> Any:
    """Its door. Raises ConfigError where it is missing."""
    try:
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it tells of kernels for other GPUs
        from torchao import quantization
    except ImportError as error:
        raise ConfigError(
            "compressed weights need torchao · model.adapters: compress · pip install 'diptych[compress]'"
        ) from error
    return quantization


def _to_int8(layer: nn.Linear) -> None:
    torchao = _torchao()
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(version=2))


@torch.no_grad()
def _to_nf4(layer: nn.Linear, where: str) -> None:
    """Not torchao's int4, whose products have no derivative: nothing below such a layer could learn."""
    blocks = layer.weight.numel() // _BLOCK
    if layer.weight.numel() % _BLOCK == 0:
        weight = _torchao().to_nf4(layer.weight.detach(), _BLOCK, gcd(_SCALES_BLOCK, blocks))
        if sharding.whole(weight).isfinite().all():  # scales that are all the same, such as 0, have none of their own
            layer.weight = nn.Parameter(weight, requires_grad=False)
            return
    raise ConfigError(
        f"{where} {list(layer.weight.shape)} does not fit into four bits, in blocks of {_BLOCK} with scales of "
        "their own · model.adapters: compress.bits · use 8"
    )
