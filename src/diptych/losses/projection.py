"""What terms that compare features with a teacher's share: its features, and a way to its width."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.distributed.groups import Group
from diptych.errors import ConfigError
from diptych.losses.batch import Pairs
from diptych.losses.pairs import Modality
from diptych.losses.plugs.family import Regulariser


def teacher_of(pairs: Pairs, modality: Modality) -> Float[Tensor, "B E"]:
    """The teacher's features of this rank's images or texts, without gradient, in the precision of the loss.

    Raises:
        ConfigError: they are not known.
    """
    known = pairs.image_known if modality == "image" else pairs.text_known
    if "teacher_features" not in known:
        raise ConfigError(
            f"teacher_features of the {modality}s are not known · objective · keep an average (ema_decay), or name a "
            "teacher"
        )
    return known["teacher_features"].detach().to(pairs.side(modality).features.dtype)


class Projected(nn.Module, Regulariser):
    """A term that sees, in place of the features, what two learned linear maps make of them: P·I and P′·T, of unit
    norm and as wide as the teacher's."""

    def __init__(self, term: Regulariser, embed_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self._term: Any = term
        self.image = nn.Linear(embed_dim, teacher_dim, bias=False)
        self.text = nn.Linear(embed_dim, teacher_dim, bias=False)

    def forward(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """The term's value; every rank of the group calls."""
        image = F.normalize(self.image(pairs.side("image").features), dim=1)
        text = F.normalize(self.text(pairs.side("text").features), dim=1)
        value: Tensor = self._term(replace(pairs, image_features=image, text_features=text), group)
        return value


def check_teacher_dim(teacher_dim: int | None) -> None:
    """Raises ValueError unless it is the width of something, or none."""
    if teacher_dim is not None and teacher_dim < 1:
        raise ValueError(f"teacher_dim must be positive, not {teacher_dim}")
