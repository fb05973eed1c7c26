"""Attributes and objects as learned words, composed anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.prompts.family import ClassAdapter, ClassPrompts, ClassReading
from diptych.models.prompts.splice import SLOT, word_vectors

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_PARTS = ("{attribute}", "{object}")


@dataclass(frozen=True)
class Compositional(ClassAdapter, name="compositional"):
    """CSP: each attribute and each object is one learned vector in a fixed template; pairs that were never trained are
    composed from them (arXiv:2204.03574). A vector starts as the mean of its words' own."""

    attributes: tuple[str, ...] = ()
    """All of them, also those that occur in untrained pairs alone."""
    objects: tuple[str, ...] = ()
    """All of them."""
    pair: str = "{attribute} {object}"
    """How the names of classes are made of the two."""
    template: str = "a photo of {attribute} {object}"
    """The prompt."""
    dropout: float = 0.3
    """Share of the vectors' numbers that is dropped in training, in [0, 1)."""

    def __post_init__(self) -> None:
        if not self.attributes or not self.objects:
            raise ValueError("attributes and objects must each name at least one")
        if any(text.count(part) != 1 for text in (self.pair, self.template) for part in _PARTS):
            raise ValueError("pair and template must each hold {attribute} and {object} once")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter. Raises ConfigError for a class that is no pair of them."""
        starts = [
            torch.stack([word_vectors(model.text_tower, model.tokenizer, word).mean(0).cpu() for word in words])
            for words in (self.attributes, self.objects)
        ]
        places = {
            self.pair.format(attribute=attribute, object=thing): (row, column)
            for row, attribute in enumerate(self.attributes)
            for column, thing in enumerate(self.objects)
        }
        return CompositionalPrompts(self.names, places, (starts[0], starts[1]), self.template, dropout=self.dropout)


class CompositionalPrompts(ClassPrompts):
    """A vector of each attribute and object."""

    def __init__(
        self,
        names: Sequence[str],
        places: Mapping[str, tuple[int, int]],
        starts: tuple[Float[Tensor, "A W"], Float[Tensor, "O W"]],
        template: str,
        *,
        dropout: float,
    ) -> None:
        super().__init__(names)
        self.places = dict(places)
        """Name of a pair → its attribute and its object."""
        self.template = template
        self.dropout = dropout
        # Embeddings, so that they do not decay.
        self.attributes, self.objects = (nn.Embedding.from_pretrained(start, freeze=False) for start in starts)
        self.pairs(names)

    def prompts(self, names: Sequence[str]) -> list[str]:
        """See ClassPrompts: all are the template alone."""
        return [self.template.format(attribute=SLOT, object=SLOT)] * len(names)

    def pairs(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Numbers of attribute and object. Raises ConfigError for a name that is no pair."""
        if unknown := [name for name in names if name not in self.places]:
            raise ConfigError(
                f"class {unknown[0]!r} is no pair of an attribute and an object · model.adapters: compositional · "
                "name both, or correct `pair`"
            )
        return [self.places[name] for name in names]

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts; of all pairs, trained or not."""
        pairs = torch.tensor(self.pairs(names), device=image_features.device)
        words = [self.attributes(pairs[:, 0]), self.objects(pairs[:, 1])]
        if self.template.index("{object}") < self.template.index("{attribute}"):
            words.reverse()
        vectors = F.dropout(torch.stack(words, 1), self.dropout, self.training)
        return ClassReading(self.encode(model, self.texts(model, names), vectors), image_features)
