"""Context vectors that each picture shifts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.models.prompts.context import ContextPrompts, Position, start_vectors
from diptych.models.prompts.family import ClassAdapter, ClassPrompts, ClassReading
from diptych.models.prompts.splice import Slotted

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class ConditionalContext(ClassAdapter, name="conditional_context"):
    """CoCoOp: the context of `context`, shifted by what a small network makes of the picture (arXiv:2203.05557,
    section 3.2).

        v_m(x) = v_m + h(x),   h(x) = W2·relu(W1·x + b1) + b2,   t_i(x) = [v_1(x)] ... [v_M(x)] NAME_i.

    W2 and b2 start at 0: the first features are those of the context alone. Every picture reads every class for
    itself: B·C texts per step, so keep `micro_batch` small.
    """

    length: int = 4
    """M, vectors of a prompt; where `words` are given, as many as they have tokens."""
    words: str | None = "a photo of a"
    """What the vectors are at the start; none: small random numbers."""
    position: Position = "front"
    """Whether the name stands behind the vectors, amid them, or before them."""
    reduction: int = 16
    """The network's inner layer is so many times narrower than a picture's feature."""

    def __post_init__(self) -> None:
        if self.length < 1 or self.reduction < 1:
            raise ValueError(f"length and reduction must be at least 1, not {self.length} and {self.reduction}")

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter."""
        start = start_vectors(model, self.words, self.length)
        return ConditionalPrompts(self.names, start, self.position, MetaNet(model.embed_dim, start, self.reduction))


class MetaNet(nn.Sequential):
    """From features [..., D] to shifts of vectors [..., W], all 0 at the start."""

    def __init__(self, dim: int, start: Float[Tensor, "M W"], reduction: int) -> None:
        inner = max(dim // reduction, 1)
        super().__init__(nn.Linear(dim, inner), nn.ReLU(), nn.Linear(inner, start.shape[1]))
        for parameter in self[2].parameters():
            nn.init.zeros_(parameter)


class ConditionalPrompts(ContextPrompts):
    """M vectors for all classes, and what shifts them."""

    conditional = True

    def __init__(
        self, names: Sequence[str], start: Float[Tensor, "M W"], position: Position, meta_net: MetaNet
    ) -> None:
        super().__init__(names, start, position)
        self.meta_net = meta_net

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts."""
        shifts = self.meta_net(image_features)[:, None, None]
        vectors = (self.context.weight + shifts).expand(-1, len(names), -1, -1)
        return ClassReading(each(self, model, self.texts(model, names), vectors), image_features)


def each(
    prompts: ClassPrompts, model: "DualEncoder", texts: Slotted, vectors: Float[Tensor, "B C M W"]
) -> Float[Tensor, "B C D"]:
    """Features of the same texts with other vectors for each picture, from one pass of the tower."""
    count = len(vectors)
    repeated = Slotted(texts.tokens.repeat(count, 1), texts.places.repeat(count, 1))
    return torch.unflatten(prompts.encode(model, repeated, vectors.flatten(0, 1)), 0, (count, -1))
