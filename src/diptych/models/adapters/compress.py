"""A base whose frozen weights are kept in eight bits."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from diptych.errors import ConfigError
from diptych.models.adapters.attention import unpack
from diptych.models.adapters.family import Adapter

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Compress(Adapter, name="compress"):
    """The linear layers of a tower in int8 with a scale per row, through torchao: a quarter of their memory.

    What learns on top (LoRA, prompts) stays in float32; name this before it. One process only. Checkpoints hold the
    weights as they are computed with, in float32: opened again, the model is a plain one with the same features.
    """

    tower: Literal["image", "text", "both"] = "both"
    """Whose layers."""

    def apply(self, model: "DualEncoder") -> None:
        """See Adapter. Raises ConfigError where torchao is missing, or one of these layers is to be trained."""
        for name in ("image_tower", "text_tower") if self.tower == "both" else (f"{self.tower}_tower",):
            tower = getattr(model, name)
            unpack(tower)  # packed attention is no linear layer
            layers = {path: module for path, module in tower.named_modules() if isinstance(module, nn.Linear)}
            if learned := [path for path, module in layers.items() if module.weight.requires_grad]:
                raise ConfigError(
                    f"{name}.{learned[0]} is to be trained, and compressed weights cannot · model.unfrozen · "
                    "leave it out, or do not compress this tower"
                )
            _quantise(tower)


def _quantise(tower: nn.Module) -> None:
    try:
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it tells of kernels for other GPUs
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ConfigError(
            "compressed weights need torchao · model.adapters: compress · pip install 'diptych[compress]'"
        ) from error
    quantize_(tower, Int8WeightOnlyConfig(version=2))
