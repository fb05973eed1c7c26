"""Negatives that surface alone makes likely count less."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Weights


@dataclass(frozen=True)
class InversePropensity(Weights, name="inverse_propensity"):
    """A negative is weighted by the inverse of how likely its likeness to the anchor makes it to be met.

        w_ik = 1 / clip(p_ik, floor, 1),   p_ik = m·g_ik + (1−m)·(1 + x_ik)/2;   w_ii = 1

    g is the cosine of the captions' n-gram counts (`surface_features`), x that of the features under stop-gradient. The
    paper samples pairs by inverse propensity; weighting the denominator with it is our adaptation.
    Source: arXiv:2309.07396.
    Cost: one more product per pair, of the width of the counts.
    Use: captions from few templates, where most negatives differ in one word.
    Verified: dense float64; floor = 1 equals CLIP.
    """

    needs: ClassVar[tuple[str, ...]] = ("surface_features",)
    surface_share: float = 0.5
    """m, in [0, 1]."""
    floor: float = 0.1
    """Smallest propensity, so largest weight = 1 / floor; in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.surface_share <= 1 or not 0 < self.floor <= 1:
            raise ValueError(
                f"surface_share must lie in [0, 1] and floor in (0, 1], not {self.surface_share} and {self.floor}"
            )

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """log w; 0 at the own partner."""
        surface = tile.anchor["surface_features"] @ tile.candidate["surface_features"].T
        semantic = (1 + tile.similarity.detach()) / 2
        propensity = self.surface_share * surface.to(semantic.dtype) + (1 - self.surface_share) * semantic
        return torch.where(tile.own(), 0.0, -propensity.clamp(self.floor, 1).log())


def surface_features(tokens: Int[Tensor, "B L"], *, width: int = 256) -> Float[Tensor, "B width"]:
    """Counts of a caption's tokens and of pairs of neighbours, hashed into `width` bins, unit norm; 0 is padding."""
    pairs = tokens[:, :-1] * 1_000_003 + tokens[:, 1:]
    grams = torch.cat([tokens, pairs], 1)
    present = torch.cat([tokens != 0, (tokens[:, :-1] != 0) & (tokens[:, 1:] != 0)], 1)
    bins = (grams * 2_654_435_761 % 4_294_967_296) % width
    counts = torch.zeros(len(tokens), width, device=tokens.device)
    return F.normalize(counts.scatter_add_(1, bins, present.float()), dim=1)
