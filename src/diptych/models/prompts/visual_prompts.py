"""Learned tokens beside the patches of a picture."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from diptych.models.adapters.family import Adapter
from diptych.models.prompts.tokens import LayerTokens, entrance, install

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class VisualPrompts(Adapter, name="visual_prompts"):
    """VPT: learned tokens beside those of a picture's patches, in a ViT of any source (arXiv:2203.12119, section 3.2).

        shallow:  [z_1, x_1] = L_1([p, x_0]),      [z_i, x_i] = L_i([z_(i-1), x_(i-1)])
        deep:     [_, x_i]   = L_i([p_i, x_(i-1)])

    p from U(-u, u), u = sqrt(6 / (3·patch² + W)), as the authors start them. To a layer the order of tokens means
    nothing; they stand in front.
    """

    length: int = 10
    """Tokens of a layer."""
    depth: Literal["shallow", "deep"] = "deep"
    """Tokens for the first layer, or new ones for each."""
    dropout: float = 0.0
    """Share of the tokens' numbers that training leaves out, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, not {self.length}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    def apply(self, model: "DualEncoder") -> None:
        """See Adapter. Raises ConfigError where the tower takes no tokens."""
        example = torch.zeros(2, 3, model.image_size, model.image_size)
        found = entrance(model.image_tower, example, where="image_tower")
        count = self.length * (len(found.layers) if self.depth == "deep" else 1)
        bound = (6 / (_patch_numbers(model.image_tower) + found.width)) ** 0.5
        start = torch.empty(count, found.width).uniform_(-bound, bound)
        tokens = LayerTokens(start, self.length, dropout=self.dropout)
        install(model.image_tower, tokens, found.layers, example, where="image_tower")


def _patch_numbers(tower: nn.Module) -> int:
    """Numbers of a patch: what the layer that makes tokens of patches takes in."""
    convolutions = (module for module in tower.modules() if isinstance(module, nn.Conv2d))
    return next((module.weight[0].numel() for module in convolutions), 3 * 16 * 16)
