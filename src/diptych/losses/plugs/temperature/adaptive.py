"""A temperature for every pair, predicted from its features."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.losses.batch import Moment
from diptych.losses.grid import Grid
from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Temperature


@dataclass(frozen=True)
class Adaptive(Temperature, name="adaptive"):
    """Pairs that a small network φ finds alike get a low temperature; a penalty keeps it from collapsing.

        τ_ij = τ_min + (τ_max − τ_min) · σ(−⟨φ(I_i), φ(T_j)⟩),   z_ij = x_ij / τ_ij
        + β·[ D/2·log τ_ii + 1/τ_ii ] − β/(N−1) · Σ_{j≠i} [ log τ_ij + 1/τ_ij ]

    The paper's loss is −x/τ of the positive plus the mean x/τ of the 100 hardest negatives; here the same temperatures
    and penalties stand in the softmax form. With the similarity `heads`, D is a head's width; all heads share φ.
    Source: arXiv:2310.05615, and the authors' code for signs and constants.
    Cost: one more product of width `hidden` per pair; φ is trained with the model.
    Use: positives of uneven difficulty (strong augmentation, several views). The default floor is far above the
    authors' 1e-5, near which the softmax form saturates.
    Verified: values and gradients, those of φ included, against dense float64; β = 0 and τ_min = τ_max equal `fixed`.
    """

    hidden: int = 128
    """Width of φ: D → hidden → hidden."""
    minimum: float = 0.01
    """τ_min."""
    maximum: float = 2.0
    """τ_max."""
    penalty_weight: float = 1e-4
    """β."""

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.maximum or self.hidden < 1:
            raise ValueError(
                f"0 < minimum ({self.minimum}) <= maximum ({self.maximum}) and hidden ({self.hidden}) >= 1 must hold"
            )

    def build(self, embed_dim: int) -> nn.Module:
        """φ with its weights; `embed_dim` is the width of what is compared."""
        return AdaptiveTemperature(self, embed_dim)


class AdaptiveTemperature(nn.Module, Temperature):
    """See `Adaptive`."""

    symmetric: ClassVar[bool] = True

    def __init__(self, config: Adaptive, embed_dim: int) -> None:
        super().__init__()
        self._config = config
        self._width = embed_dim
        self.network = nn.Sequential(
            nn.Linear(embed_dim, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.hidden)
        )

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """φ of every feature."""
        rows = grid.rows.know(phi=self.network(grid.rows.features))
        columns = grid.columns.know(phi=self.network(grid.columns.features))
        count = grid.rows.features.new_tensor(float(grid.columns.num_anchors))
        return replace(grid, rows=rows, columns=columns).share(num_candidates=count)

    def forward(self, tile: Tile) -> Float[Tensor, "R C"]:
        """Similarities over the pair's temperature."""
        return tile.similarity / self._temperature(tile)

    def penalty(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """β times the regulariser of a pair's temperature."""
        if not self._config.penalty_weight:
            return None
        temperature = self._temperature(tile)
        own = self._width / 2 * temperature.log() + 1 / temperature
        other = (temperature.log() + 1 / temperature) / (tile.shared["num_candidates"] - 1).clamp(min=1)
        return self._config.penalty_weight * torch.where(tile.own(), own, -other)

    def _temperature(self, tile: Tile) -> Float[Tensor, "R C"]:
        alike = tile.anchor["phi"] @ tile.candidate["phi"].T
        span = self._config.maximum - self._config.minimum
        return self._config.minimum + span * torch.sigmoid(-alike)
