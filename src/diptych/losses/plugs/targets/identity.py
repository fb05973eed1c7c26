"""The own partner alone is right."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Targets


@dataclass(frozen=True)
class Identity(Targets, name="identity"):
    """Each image's own text is right, and nothing else.

        π_ij = 1 if i = j else 0

    Source: arXiv:2103.00020, figure 3.
    Cost: none.
    Use: the default.
    Verified: equals open_clip's ClipLoss and SigLipLoss.
    """

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """1 at the own partner."""
        return tile.own().to(tile.logits.dtype) if tile.has_own() else None
