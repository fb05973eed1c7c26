"""Several positives that do not compete."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.losses.composition import Composition
from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Layout
from diptych.losses.plugs.normaliser.family import AnchorLosses, Normaliser, over_targets


@dataclass(frozen=True)
class DecoupledSoftmax(Normaliser, name="decoupled_softmax"):
    """Each positive is compared with all negatives, and with no other positive.

        loss_i = Σ_p π_ip · [ log(exp(z_ip) + Σ_{n: π_in = 0} w_in exp(z_in)) − z_ip ]

    Source: arXiv:2310.10636, decoupled softmax.
    Cost: two reductions over all pairs: twice the time.
    Use: targets with several positives of very different frequency.
    Verified: dense float64; one positive each equals `softmax`.
    """

    def losses(self, layout: Layout, plugs: Composition) -> AnchorLosses:
        """Both directions' anchors."""
        grid = layout.grid

        def negatives(tile: Tile) -> Sequence[Tensor]:
            right, energy = plugs.targets(tile), plugs.energy(tile)
            return (energy if right is None else energy.masked_fill(right > 0, -torch.inf),)

        def positives(tile: Tile) -> Sequence[Tensor | None]:
            right = plugs.targets(tile)
            if right is None:
                return (None, None)
            softplus = torch.logaddexp(tile.logits, tile.anchor["negatives"][:, None]) - tile.logits
            return (right * softplus, right)

        found = grid.reduce(negatives, ("logsumexp",), symmetric=plugs.symmetric)
        known = {direction: found[direction][0] for direction in grid.directions}
        found = grid.know("negatives", **known).reduce(positives, ("sum", "sum"))
        return over_targets(grid, found)
