"""Context vectors that a picture moves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.models.prompts.context import Context, ContextPrompts, Position, start_vectors
from diptych.models.prompts.family import ClassPrompts, ClassReading
from diptych.models.prompts.splice import Slotted

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_TEXTS_AT_ONCE = 512


@dataclass(frozen=True)
class ConditionalContext(Context, name="conditional_context"):
    """CoCoOp: a small network moves the context vectors by the picture (arXiv:2203.05557, section 3.2).

        v_m(x) = v_m + h(I),   h: D -> D/16 -> W with a ReLU between

    Generalises better to classes beside the trained ones; the text tower reads each class once for every picture, so
    batches must be small.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_class:
            raise ValueError("vectors that the picture moves are shared by all classes; leave per_class out")

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter."""
        start = start_vectors(model, self.words, self.length)
        return ConditionalPrompts(self.names, start, self.position, image_dim=model.embed_dim)


class ConditionalPrompts(ContextPrompts):
    """M vectors and the network that moves them."""

    conditional: ClassVar[bool] = True

    def __init__(
        self, names: Sequence[str], start: Float[Tensor, "M W"], position: Position, *, image_dim: int
    ) -> None:
        super().__init__(names, start, position)
        hidden = max(image_dim // 16, 1)
        self.meta_net = nn.Sequential(nn.Linear(image_dim, hidden), nn.ReLU(), nn.Linear(hidden, start.shape[1]))

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts."""
        prompts = self.texts(model, names)
        vectors = self.context.weight + self.meta_net(image_features)[:, None]
        parts = [self._read(model, prompts, rows) for rows in vectors.split(max(_TEXTS_AT_ONCE // len(names), 1))]
        return ClassReading(torch.cat(parts), image_features)

    def _read(self, model: "DualEncoder", prompts: Slotted, vectors: Float[Tensor, "B M W"]) -> Float[Tensor, "B C D"]:
        count, classes = len(vectors), len(prompts.tokens)
        repeated = Slotted(prompts.tokens.repeat(count, 1), prompts.places.repeat(count, 1))
        found = self.encode(model, repeated, vectors.repeat_interleave(classes, 0))
        return found.unflatten(0, (count, classes))
