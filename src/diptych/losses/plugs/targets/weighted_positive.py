"""Easy positives pull less, hard ones more."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.distributed.collectives import mean_over
from diptych.losses.batch import Moment
from diptych.losses.grid import Grid
from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Targets


@dataclass(frozen=True)
class WeightedPositive(Targets, name="weighted_positive"):
    """The weighted positive term of decoupled contrastive learning (with the weights `decoupled`).

        π_ii = 2 − exp(x_ii / σ) / mean_k exp(x_kk / σ),   under stop-gradient; not normalised

    Source: arXiv:2110.06848, DCLW (σ = 0.5).
    Cost: none.
    Use: with `decoupled`, at small batches.
    Verified: dense float64; σ → ∞ equals `identity`; the mean of the weights is 1.
    """

    normalise: ClassVar[bool] = False
    sigma: float = 0.5
    """σ, above 0."""

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, not {self.sigma}")

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """The weight of each pair."""
        image, text = grid.own_of("image").features, grid.own_of("text").features
        powers = torch.exp(torch.linalg.vecdot(image, text).detach() / self.sigma)
        weight = 2 - powers / mean_over(powers.mean(), grid.group)
        return grid.know("positive_weight", rows=weight, columns=weight)

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """The weight at the own partner."""
        return tile.own() * tile.anchor["positive_weight"][:, None] if tile.has_own() else None
