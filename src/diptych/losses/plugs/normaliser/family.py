"""How an anchor's logits become its loss."""

from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diptych.config import Choice
from diptych.losses.composition import Composition
from diptych.losses.grid import Anchored, Grid
from diptych.losses.pairs import Direction, Modality
from diptych.losses.plugs.family import Layout, Plug

AnchorLosses = Mapping[Modality, Float[Tensor, " B"]]
"""The loss of each of this rank's anchors. The total is the mean over modalities of the mean over anchors."""


class Normaliser(Plug, Choice):
    """How an anchor's logits become its loss."""

    directions: ClassVar[tuple[Direction, ...]] = ("rows", "columns")
    """Whose anchors have losses."""

    def losses(self, layout: Layout, plugs: Composition) -> AnchorLosses:
        """The loss of each anchor. Every rank of the group calls."""
        raise NotImplementedError


def over_targets(grid: Grid, found: Anchored) -> AnchorLosses:
    """Losses that were summed with their targets, over the sums of the targets."""
    return {grid.anchors(direction).modality: loss / targets for direction, (loss, targets) in found.items()}
