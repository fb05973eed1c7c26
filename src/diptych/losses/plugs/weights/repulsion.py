"""Near negatives count more."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.batch import Moment
from diptych.losses.grid import Grid
from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Weights


@dataclass(frozen=True)
class Repulsion(Weights, name="repulsion"):
    """Negatives are weighted by their nearness to the anchor, mean weight 1: contrastive repulsion in the softmax form.

        w_ik = π_ik / mean_{j≠i} π_ij,   π_ik ∝ exp(−t·‖I_i − T_k‖²) ∝ exp(2t·x_ik);   w_ii = 1

    Source: arXiv:2105.03746 (t⁻ from 0.9 to 2; one positive makes its attraction plain).
    Cost: a reduction over all pairs before the loss: about twice the time.
    Use: hard negatives matter and false ones are rare.
    Verified: dense float64, gradients through the weights and without; t = 0 equals CLIP.
    """

    symmetric: ClassVar[bool] = False
    t: float = 2.0
    """t⁻: 0 weighs all alike."""
    stop_gradient: bool = False
    """Whether the weights are constants; the paper lets gradients through, its large-scale code does not."""

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """log mean over the negatives of exp(2t·x), of every anchor."""
        found = grid.reduce(lambda tile: (self._nearness(tile), _others(tile)), ("logsumexp", "sum"))
        known = {direction: total - others.clamp(min=1).log() for direction, (total, others) in found.items()}
        return grid.know("log_nearness", **known)

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """log w; 0 at the own partner."""
        log_weight = 2 * self.t * tile.similarity - tile.anchor["log_nearness"][:, None]
        log_weight = log_weight.detach() if self.stop_gradient else log_weight
        return torch.where(tile.own(), 0.0, log_weight)

    def _nearness(self, tile: Tile) -> Tensor:
        return torch.where(tile.own(), -torch.inf, 2 * self.t * tile.similarity)


def _others(tile: Tile) -> Tensor:
    return (~tile.own()).to(tile.logits.dtype)
