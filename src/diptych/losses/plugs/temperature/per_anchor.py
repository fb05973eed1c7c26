"""A temperature of its own for every anchor."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Temperature


@dataclass(frozen=True)
class PerAnchor(Temperature, name="per_anchor"):
    """Each image and each text divides its similarities by its own temperature, which the batch brings along.

        z_ij = x_ij / τ_i   (image i as anchor),   z_ji = x_ij / τ_j   (text j as anchor)

    Source: arXiv:2305.11965 (there learned by `isogclr`, which sets them itself).
    Cost: one exponential per direction instead of one for both.
    Use: with temperatures from elsewhere: a schedule, a model, a table.
    Verified: values and gradients, those of τ included, against dense float64; equal τ equal `fixed`.
    """

    needs: ClassVar[tuple[str, ...]] = ("temperatures",)
    symmetric: ClassVar[bool] = False

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"]:
        """Similarities over the anchor's temperature."""
        return tile.similarity / tile.anchor["temperatures"][:, None]
