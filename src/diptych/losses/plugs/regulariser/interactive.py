"""The model's pictures among the teacher's texts, and the other way round."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.distributed.groups import Group
from diptych.losses.batch import Pairs, gathered, numbered
from diptych.losses.grid import Grid
from diptych.losses.pairs import OPPOSITE, Modality, Tile
from diptych.losses.plugs.family import Regulariser
from diptych.losses.projection import Projected, check_teacher_dim, teacher_of


@dataclass(frozen=True)
class Interactive(Regulariser, name="interactive"):
    """Each picture is compared with the teacher's texts, each text with the teacher's pictures.

        ½·mean_i [ log Σ_j exp(s·⟨I_i, T̄_j⟩) − s·⟨I_i, T̄_i⟩ + log Σ_j exp(s·⟨T_i, Ī_j⟩) − s·⟨T_i, Ī_i⟩ ]

    Ī, T̄ are `teacher_features`, of the whole group; s is the model's logit scale (the authors' code learns another).
    With `teacher_dim`, norm(P·I_i) and norm(P′·T_i) stand in the place of I_i and T_i; P, P′ are learned.
    Source: arXiv:2307.12732, interactive contrastive learning (weight 1).
    Cost: a forward pass of the teacher; two products per pair, and both of the teacher's sides are gathered.
    Use: beside `momentum` targets and `distillation` of a `teacher`, whose space the model's pictures and texts enter.
    Verified: dense float64, P and P′ included, across ranks; equals the candidates `queue` of size 0 where nothing is
    projected.
    """

    needs: ClassVar[tuple[str, ...]] = ("teacher_features",)
    weight: float = 1.0
    """Factor of this term in the total."""
    teacher_dim: int | None = None
    """Width of the teacher's features, to which the model's are projected; none: they are compared as they are."""

    def __post_init__(self) -> None:
        check_teacher_dim(self.teacher_dim)

    def teacher_width(self, embed_dim: int) -> int | None:
        """That of what the teacher's features are compared with."""
        return embed_dim if self.teacher_dim is None else self.teacher_dim

    def build(self, embed_dim: int) -> "Interactive | nn.Module":
        """Itself, or P and P′ before it."""
        return self if self.teacher_dim is None else Projected(self, embed_dim, self.teacher_dim)

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """The mean over this rank's pairs."""
        return torch.stack([_against(pairs, mine, theirs, group) for mine, theirs in OPPOSITE]).mean()


def _against(pairs: Pairs, modality: Modality, other: Modality, group: Group) -> Float[Tensor, ""]:
    """The cross-entropy of this rank's anchors over the teacher's features of the other modality."""
    anchors, teacher = pairs.side(modality), teacher_of(pairs, other)
    scale = pairs.logit_scale.to(teacher.dtype)
    grid = Grid(
        numbered(anchors, group),
        gathered(replace(pairs.side(other), features=teacher), group),
        {"logit_scale": scale},
        group,
        directions=("rows",),
    )
    (log_sums,) = grid.reduce(_logits, ("logsumexp",))["rows"]
    return (log_sums - scale * (anchors.features * teacher).sum(1)).mean()


def _logits(tile: Tile) -> tuple[Tensor]:
    return (tile.logits,)
