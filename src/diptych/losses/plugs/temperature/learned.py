"""One scale for all pairs."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diptych.losses.grid import scaled
from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Temperature


@dataclass(frozen=True)
class Learned(Temperature, name="learned"):
    """The model's logit scale, learned with everything else.

        z_ij = s · x_ij

    Source: arXiv:2103.00020, figure 3.
    Cost: none.
    Use: the default.
    Verified: gradient of s against dense float64 and against open_clip's losses.
    """

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"]:
        """Scaled similarities."""
        return scaled(tile)
