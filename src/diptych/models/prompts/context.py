"""Context vectors in place of a template's words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.prompts.family import ClassAdapter, ClassPrompts, ClassReading
from diptych.models.prompts.splice import SLOT, vocabulary, word_vectors

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_START_STD = 0.02
Position = Literal["front", "middle", "end"]


@dataclass(frozen=True)
class Context(ClassAdapter, name="context"):
    """CoOp: the words around a class's name are learned vectors, "[V]1 ... [V]M NAME." (arXiv:2109.01134).

    The same vectors for all classes read classes that were never seen, too.
    """

    length: int = 16
    """M, vectors of a prompt; where `words` are given, as many as they have tokens."""
    words: str | None = None
    """What the vectors are at the start, such as `a photo of a`; none: small random numbers."""
    position: Position = "front"
    """Whether the name stands behind the vectors, amid them, or before them."""
    per_class: bool = False
    """Vectors of each class's own: better with many pictures of a class, of no use for classes beside them."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, not {self.length}")

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter."""
        start = start_vectors(model, self.words, self.length)
        return ContextPrompts(self.names, start, self.position, per_class=self.per_class)


class ContextPrompts(ClassPrompts):
    """M vectors for all classes, or for each."""

    def __init__(
        self, names: Sequence[str], start: Float[Tensor, "M W"], position: Position, *, per_class: bool = False
    ) -> None:
        super().__init__(names)
        self.position = position
        self.length, width = start.shape
        self.per_class = per_class
        # An embedding, so that its vectors do not decay.
        self.context = nn.Embedding(self.length * (len(self.names) if per_class else 1), width)
        with torch.no_grad():
            self.context.weight.copy_(start.repeat(len(self.names) if per_class else 1, 1))

    def prompts(self, names: Sequence[str]) -> list[str]:
        """See ClassPrompts."""
        return [around(name, self.length, self.position) for name in names]

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts. Raises ConfigError for other classes than those that have vectors."""
        vectors = self.context.weight.unflatten(0, (-1, self.length))
        if not self.per_class:
            vectors = vectors.expand(len(names), -1, -1)
        elif tuple(names) != self.names:
            raise ConfigError("each class has vectors of its own, others have none · model.adapters: per_class")
        return ClassReading(self.encode(model, self.texts(model, names), vectors), image_features)

    def vectors(self) -> dict[str, Float[Tensor, "M W"]]:
        """See ClassPrompts."""
        found = self.context.weight.unflatten(0, (-1, self.length))
        return dict(zip(self.names if self.per_class else ("context",), found, strict=True))


def around(name: str, length: int, position: Position) -> str:
    """`length` slots and a name, with a full stop, as in the paper."""
    before = {"front": length, "middle": length // 2, "end": 0}[position]
    words = [*[SLOT] * before, name, *[SLOT] * (length - before)]
    return f"{' '.join(words)}."


def start_vectors(model: "DualEncoder", words: str | None, length: int) -> Float[Tensor, "M W"]:
    """Those of words, or `length` random ones, as wide as the tower's embeddings of words."""
    if words is None:
        return torch.randn(length, vocabulary(model.text_tower).embedding_dim) * _START_STD
    found = word_vectors(model.text_tower, model.tokenizer, words)
    if not len(found):
        raise ConfigError(f"no token in {words!r} · model.adapters: words · leave it out, or write a word")
    return found.cpu()
