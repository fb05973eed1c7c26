"""Features as the teacher has them."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from diptych.distributed.groups import Group
from diptych.losses.batch import Pairs
from diptych.losses.plugs.family import Regulariser
from diptych.losses.projection import Projected, check_teacher_dim, teacher_of


@dataclass(frozen=True)
class Distillation(Regulariser, name="distillation"):
    """Features stay near the averaged model's, or come near those of a `teacher`.

        mean_i ‖I_i − Ī_i‖² + ‖T_i − T̄_i‖²,   Ī, T̄: `teacher_features`

    With `teacher_dim`, norm(P·I_i) and norm(P′·T_i) stand in the place of I_i and T_i; P, P′ are learned. Between unit
    vectors this is 2 − 2·cosine.
    Source: arXiv:2504.16801, global distillation (there 0.005 times the sum over the 32 pairs of a device; EMA 0.9996);
    arXiv:2307.12732, feature distillation (there also the mean over the numbers of a feature, times 2,000: a weight of
    2,000 / D here).
    Cost: a forward pass of the teacher.
    Use: fine-tuning on hard captions without forgetting; a small model that learns from a large one.
    Verified: dense float64, P and P′ included; no gradient reaches the teacher; a teacher equal to the model gives 0.
    """

    needs: ClassVar[tuple[str, ...]] = ("teacher_features",)
    weight: float = 0.16
    """Factor of this term in the total."""
    teacher_dim: int | None = None
    """Width of the teacher's features, to which the model's are projected; none: they are compared as they are."""

    def __post_init__(self) -> None:
        check_teacher_dim(self.teacher_dim)

    def teacher_width(self, embed_dim: int) -> int | None:
        """That of what the teacher's features are compared with."""
        return embed_dim if self.teacher_dim is None else self.teacher_dim

    def build(self, embed_dim: int) -> "Distillation | nn.Module":
        """Itself, or P and P′ before it."""
        return self if self.teacher_dim is None else Projected(self, embed_dim, self.teacher_dim)

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """The mean over this rank's pairs."""
        image = (pairs.side("image").features - teacher_of(pairs, "image")).square().sum(1)
        return (image + (pairs.side("text").features - teacher_of(pairs, "text")).square().sum(1)).mean()
