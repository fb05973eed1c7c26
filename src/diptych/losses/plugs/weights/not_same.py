"""Equal captions are not negatives of each other."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Weights


@dataclass(frozen=True)
class NotSameCaption(Weights, name="not_same_caption"):
    """Other pairs with the anchor's caption are neither right nor wrong: they are left out.

        w_ij = 0 if c_i = c_j and i ≠ j else 1

    Source: arXiv:2004.11362, whose equal classes are no negatives; here equal captions.
    Cost: one comparison per pair.
    Use: data with repeated captions, where `same_caption` targets would tie different pictures together.
    Verified: dense float64, repeated ids across ranks; distinct captions equal CLIP.
    """

    needs: ClassVar[tuple[str, ...]] = ("caption_ids",)

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """-inf at other pairs of equal caption."""
        dropped = tile.same("caption_ids") & ~tile.own()
        return torch.zeros_like(tile.logits).masked_fill_(dropped, -torch.inf)
