"""A picture, or a caption, against its own hard captions and nothing else."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych.distributed.groups import Group
from diptych.losses.batch import Pairs
from diptych.losses.plugs.candidates.hard_captions import known_hard_captions
from diptych.losses.plugs.family import Regulariser
from diptych.losses.projection import teacher_of


@dataclass(frozen=True)
class ImageGrounded(Regulariser, name="image_grounded"):
    """IGC: which of its own true and hard captions belongs to a picture.

        −mean_i log [ exp(s·⟨I_i, T_i⟩) / (exp(s·⟨I_i, T_i⟩) + Σ_k exp(s·⟨I_i, H_ik⟩)) ]

    Source: arXiv:2504.16801, image-grounded contrast (weight 0.1).
    Cost: B·K products.
    Use: with `hard_captions`, to learn word order and attributes.
    Verified: dense float64; sees the picture's own captions only; K = 0 gives 0.
    """

    weight: float = 0.1
    """Factor of this term in the total."""

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """The mean over this rank's pairs."""
        image = pairs.side("image").features
        return _choice(image, pairs.side("text").features, known_hard_captions(pairs), pairs.logit_scale)


@dataclass(frozen=True)
class TextGrounded(Regulariser, name="text_grounded"):
    """TGC: which of the teacher's true caption and the student's hard captions belongs to the student's true caption.

        −mean_i log [ exp(c·⟨T_i, T̄_i⟩) / (exp(c·⟨T_i, T̄_i⟩) + Σ_k exp(c·⟨T_i, H_ik⟩)) ],   T̄: `teacher_features`

    Source: arXiv:2504.16801, text-grounded contrast (c = 10, weight 0.1).
    Cost: B·K products, and a forward pass of the teacher's text tower.
    Use: with `image_grounded`; keeps true captions apart from hard ones in the text tower itself.
    Verified: dense float64; no gradient reaches the teacher; K = 0 gives 0.
    """

    needs: ClassVar[tuple[str, ...]] = ("teacher_features",)
    weight: float = 0.1
    """Factor of this term in the total."""
    scale: float = 10.0
    """c."""

    def teacher_width(self, embed_dim: int) -> int | None:
        """The model's own."""
        return embed_dim

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """The mean over this rank's pairs."""
        teacher = teacher_of(pairs, "text")
        scale = torch.tensor(self.scale, device=teacher.device)
        return _choice(pairs.side("text").features, teacher, known_hard_captions(pairs), scale)


def _choice(anchors: Tensor, right: Tensor, wrong: Float[Tensor, "B K D"], scale: Tensor) -> Float[Tensor, ""]:
    """Mean cross-entropy of each anchor over its one right and its K wrong candidates."""
    candidates = torch.cat([right[:, None, :], wrong.to(anchors.dtype)], 1)
    logits = scale * torch.einsum("bd,bkd->bk", anchors, candidates)
    return F.cross_entropy(logits, torch.zeros(len(anchors), dtype=torch.long, device=anchors.device))
