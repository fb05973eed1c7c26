"""The positive leaves the denominator."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Weights


@dataclass(frozen=True)
class Decoupled(Weights, name="decoupled"):
    """The own partner is no candidate of the denominator.

        w_ii = 0

    Source: arXiv:2110.06848, DCL.
    Cost: one pass over the tiles that hold positives.
    Use: small batches, where the factor 1 − p_ii of the gradient slows learning.
    Verified: dense float64; the gradient towards negatives is their softmax without the factor 1 − p_ii.
    """

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """-inf at the own partner."""
        if not tile.has_own():
            return None
        return torch.zeros_like(tile.logits).masked_fill_(tile.own(), -torch.inf)
