"""Learned tokens in the layers of a text tower."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diptych.errors import ConfigError
from diptych.models.adapters.family import Adapter
from diptych.models.prompts.splice import slotted
from diptych.models.prompts.tokens import LayerTokens, entrance, install

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_START_STD = 0.02


@dataclass(frozen=True)
class TextTokens(Adapter, name="text_tokens"):
    """SoftREPA's soft text tokens: each of a text tower's layers has tokens of its own in front of the words, and drops
    what it makes of them (arXiv:2503.08250).

        [_, x_i] = L_i([p_i, x_(i-1)])      p_i [length, W], from N(0, 0.02^2)

    All captions have the same tokens: pairs without classes teach them by the contrastive term, as the paper's do by
    its own. The paper's generators have tokens per time step besides; a text tower knows no time.
    """

    length: int = 8
    """Tokens of a layer."""
    layers: int | None = None
    """How many layers have any, from the first on; none: all of them."""

    def __post_init__(self) -> None:
        if self.length < 1 or (self.layers is not None and self.layers < 1):
            raise ValueError(f"length and layers must be at least 1, not {self.length} and {self.layers}")

    def apply(self, model: "DualEncoder") -> None:
        """See Adapter. Raises ConfigError where the tower takes no tokens, or has fewer layers."""
        example = slotted(model.tokenizer, ["a photo", "a photo of the snow"]).tokens  # of two lengths, for the masks
        found = entrance(model.text_tower, example, where="text_tower")
        count = self.layers if self.layers is not None else len(found.layers)
        if count > len(found.layers):
            raise ConfigError(
                f"the text_tower has {len(found.layers)} layers, not {count} · model.adapters: text_tokens.layers"
            )
        tokens = LayerTokens(torch.randn(count * self.length, found.width) * _START_STD, self.length)
        install(model.text_tower, tokens, found.layers[:count], example, where="text_tower")
