"""A teacher says what else is right."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.batch import Moment
from diptych.losses.grid import Grid
from diptych.losses.pairs import Tile
from diptych.losses.plugs.candidates.queue import older_self
from diptych.losses.plugs.family import Targets


@dataclass(frozen=True)
class Momentum(Targets, name="momentum"):
    """Part of the target is the softmax of a teacher over the same candidates.

        π_ij = (1−a)·[i = j] + a·softmax_j(s̄ · ⟨Ī_i, T̄_j⟩)

    Ī, T̄ are `teacher_features`: those of the averaged model, with the model's own s for s̄; or those of a `teacher`, of
    whatever width, with the scale that it was trained with.
    Source: arXiv:2107.07651, momentum distillation (a = 0.4, raised linearly over the first epoch). With a `teacher`
    and a = 1, to a constant, the contrastive relational distillation of arXiv:2307.12732 and the affinity mimicking of
    arXiv:2309.12314; the former adds it to CLIP's loss: a = 0.5 at twice the weight.
    Cost: a forward pass of the teacher per step, and two more products per pair.
    Use: noisy web captions; with the candidates `queue`; a small model that learns from a large one.
    Verified: dense float64; a = 0 equals `identity`; targets sum to 1 over batch and queue; a teacher of another width
    and scale.
    """

    needs: ClassVar[tuple[str, ...]] = ("teacher_features",)
    symmetric: ClassVar[bool] = False
    normalise: ClassVar[bool] = False
    share: float = 0.4
    """a, in [0, 1]."""
    ramp_samples: int = 0
    """Samples seen over which a rises linearly from 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], not {self.share}")
        if self.ramp_samples < 0:
            raise ValueError(f"ramp_samples must not be negative, it is {self.ramp_samples}")

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """The teacher's normalisers, by one reduction over all pairs."""
        ramp = min(1.0, moment.samples_seen / self.ramp_samples) if self.ramp_samples else 1.0
        grid = grid.share(
            teacher_share=grid.rows.features.new_tensor(self.share * ramp),
            teacher_scale=grid.shared.get("teacher_scale", grid.shared["logit_scale"]).detach(),
        )
        with torch.no_grad():
            found = grid.reduce(lambda tile: (_teacher_logits(tile),), ("logsumexp",))
        return grid.know("teacher_log_sum", **{direction: log_sum for direction, (log_sum,) in found.items()})

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """The mixture; sums to 1 over all candidates."""
        share = tile.shared["teacher_share"]
        soft = torch.exp(_teacher_logits(tile) - tile.anchor["teacher_log_sum"][:, None])
        return share * soft + (1 - share) * tile.own().to(soft.dtype)


def _teacher_logits(tile: Tile) -> Tensor:
    alike = tile.anchor["teacher_features"].detach() @ tile.candidate["teacher_features"].detach().T
    logits = alike * tile.shared["teacher_scale"]
    return logits.masked_fill(older_self(tile), -torch.inf) if "in_queue" in tile.candidate.info else logits
