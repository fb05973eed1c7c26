"""A scale that is not learned."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Temperature


@dataclass(frozen=True)
class Fixed(Temperature, name="fixed"):
    """A constant temperature; the model's logit scale gets no gradient.

        z_ij = x_ij / τ

    Source: arXiv:2002.05709, eq. 1.
    Cost: none.
    Use: fine-tuning at a known temperature, such as 0.02 of arXiv:2504.17432.
    Verified: equals `learned` at s = 1/τ.
    """

    temperature: float = 0.07
    """τ, above 0."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"]:
        """Similarities over the temperature."""
        return tile.similarity / self.temperature
