"""Features that fill the sphere, and partners that lie close."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diptych import geometry
from diptych.distributed.collectives import all_gather
from diptych.distributed.groups import Group
from diptych.losses.batch import Pairs, gathered, numbered
from diptych.losses.grid import Grid
from diptych.losses.pairs import Modality, Tile
from diptych.losses.plugs.family import Regulariser


@dataclass(frozen=True)
class Uniformity(Regulariser, name="uniformity"):
    """How evenly features lie on the sphere, within each modality and, if asked, across.

        u(X, Y) = log mean_{i≠j} exp(−2‖x_i − y_j‖²);   ½·u(I, I) + ½·u(T, T) + cross·u(I, T)

    Source: arXiv:2405.18570 (after arXiv:2005.10242).
    Cost: two more products per pair, three with `cross`; images are gathered as well.
    Use: to close the contrastive gap between the modalities; with `alignment`.
    Verified: dense float64, across ranks; a batch of one gives 0.
    """

    weight: float = 1.0
    """Factor of this term in the total."""
    cross: float = 0.0
    """Factor of the part across modalities, relative to the rest."""

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """One number for the group's batch, the same on all its ranks."""
        value = (_spread(pairs, "image", "image", group) + _spread(pairs, "text", "text", group)) / 2
        return value + self.cross * _spread(pairs, "image", "text", group) if self.cross else value


@dataclass(frozen=True)
class Alignment(Regulariser, name="alignment"):
    """How near partners lie.

        mean_i ‖I_i − T_i‖²

    Source: arXiv:2405.18570 (after arXiv:2005.10242, with its α = 2).
    Cost: none.
    Use: with `uniformity`.
    Verified: dense float64, across ranks.
    """

    weight: float = 1.0
    """Factor of this term in the total."""

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """The mean over this rank's pairs."""
        return geometry.alignment(pairs.image_features, pairs.text_features)


def _spread(pairs: Pairs, rows: Modality, columns: Modality, group: Group) -> Float[Tensor, ""]:
    """log mean over all pairs of different numbers of exp(−2·squared distance)."""
    grid = Grid(
        numbered(pairs.side(rows), group),
        gathered(pairs.side(columns), group),
        {},
        group,
        directions=("rows",),
        logits=_near,
    )
    count = len(grid.columns)
    if count < 2:
        return pairs.image_features.new_zeros((), requires_grad=False) + 0 * pairs.image_features.float().sum()
    (log_sums,) = grid.reduce(_others, ("logsumexp",))["rows"]
    return torch.logsumexp(all_gather(log_sums, group), 0) - math.log(count * (count - 1))


def _near(tile: Tile) -> Tensor:
    return geometry.exponent(tile.similarity)


def _others(tile: Tile) -> tuple[Tensor]:
    return (tile.logits.masked_fill(tile.own(), -torch.inf),)
