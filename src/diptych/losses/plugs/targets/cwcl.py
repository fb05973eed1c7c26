"""Every candidate is as right as it resembles the own partner."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.batch import Moment
from diptych.losses.grid import Grid
from diptych.losses.pairs import Modality, Tile
from diptych.losses.plugs.family import Targets


@dataclass(frozen=True)
class Cwcl(Targets, name="cwcl"):
    """Continuously weighted: targets are similarities within the modality of a frozen tower.

        π_ij = w_ij / Σ_k w_ik,   w_ij = (⟨u_i, u_j⟩ + 1) / 2;   with sharpness τ > 0:  w_ij = exp((⟨u_i, u_j⟩ − 1) / τ)

    u_i is the frozen tower's feature of pair i. Anchors of the trained modality have these targets, the others the
    identity.
    Source: arXiv:2309.14580.
    Cost: one more product per pair.
    Use: one tower locked and already good. The plain weights are nearly flat for features that lie in a cone; sharpen
    them then.
    Verified: dense float64; sharpened orthonormal u equal `identity`; rows sum to 1.
    """

    symmetric: ClassVar[bool] = False
    anchor: Modality = "text"
    """The trained modality; the other one's features, under stop-gradient, are u."""
    sharpness: float = 0.0
    """τ above; 0: the paper's linear weights."""

    def __post_init__(self) -> None:
        if self.sharpness < 0:
            raise ValueError(f"sharpness must not be negative, it is {self.sharpness}")

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """Each pair's feature from the frozen tower, known on both sides."""
        frozen = grid.own_of("image" if self.anchor == "text" else "text").features.detach()
        return grid.know("frozen", rows=frozen, columns=frozen)

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """w for anchors of the trained modality."""
        if tile.anchor.modality != self.anchor:
            return tile.own().to(tile.logits.dtype) if tile.has_own() else None
        alike = tile.anchor["frozen"] @ tile.candidate["frozen"].T
        return torch.exp((alike - 1) / self.sharpness) if self.sharpness > 0 else (alike + 1) / 2
