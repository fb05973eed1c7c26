"""Every pair is a question of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from diptych.losses.composition import Composition
from diptych.losses.pairs import Direction, Tile
from diptych.losses.plugs.family import Layout
from diptych.losses.plugs.normaliser.family import AnchorLosses, Normaliser


@dataclass(frozen=True)
class Sigmoid(Normaliser, name="sigmoid"):
    """SigLIP's loss: is this text this picture's? Give the model a logit_bias.

        loss_i = Σ_j w_ij · [ softplus(z_ij + b) − t_ij (z_ij + b) ],   t_ij in [0, 1]

    For t in {0, 1} this is −Σ_j log σ(±(z_ij + b)). Pairs are counted once, from the image's side.
    Source: arXiv:2303.15343, eq. 1 and algorithm 1.
    Cost: as `softmax`, without statistics of columns: texts alone are gathered.
    Use: batches up to some ten thousand; needs no sum over the batch.
    Verified: open_clip's SigLipLoss on one and two processes; dense float64.
    """

    directions: ClassVar[tuple[Direction, ...]] = ("rows",)

    def losses(self, layout: Layout, plugs: Composition) -> AnchorLosses:
        """The images'."""

        def fold(tile: Tile) -> Sequence[Tensor]:
            logits = tile.logits + tile.shared["logit_bias"]
            right = plugs.targets(tile)
            loss = -F.logsigmoid(-logits) if right is None else -F.logsigmoid(-logits) - right * logits
            energy = plugs.energy(tile)
            return (loss if energy is tile.logits else loss * (energy - tile.logits).exp(),)

        found = layout.grid.reduce(fold, ("sum",))
        return {layout.grid.rows.modality: found["rows"][0]}
