"""Attributes and objects as words that are learned once and put together anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.prompts.family import ClassAdapter, ClassPrompts, ClassReading, listed
from diptych.models.prompts.splice import SLOT, word_vectors

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_PARTS = ("{attribute}", "{object}")


@dataclass(frozen=True)
class Compositional(ClassAdapter, name="compositional"):
    """CSP: a class is a pair of an attribute and an object, each one learned vector; the words around them stay
    (arXiv:2204.03574, section 4).

        t_(a, o) = "a photo of" [v_a] [v_o] "."       v at the start: the mean of the word's own embeddings

    Vectors learned in some pairs read pairs that were never seen, by their names.
    """

    attributes: tuple[str, ...] | Path = ()
    """All attributes, those of pairs that are only met later included, or a file with one per line."""
    objects: tuple[str, ...] | Path = ()
    """All objects, in the same way."""
    template: str = "a photo of {attribute} {object}."
    """Where the two stand in what the tower reads."""
    pattern: str = "{attribute} {object}"
    """How a class's name is made of the two, such as `{object}: {attribute}`."""
    dropout: float = 0.3
    """Share of the vectors' numbers that training leaves out (the paper's attribute dropout), in [0, 1)."""

    def __post_init__(self) -> None:
        if not self.attributes or not self.objects:
            raise ValueError("attributes and objects must be named")
        for key, text in (("template", self.template), ("pattern", self.pattern)):
            if any(text.count(part) != 1 for part in _PARTS):
                raise ValueError(f"{key} must hold {{attribute}} and {{object}} once each, not {text!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    def build(self, model: "DualEncoder") -> ClassPrompts:
        """See ClassAdapter. Raises ConfigError for a class that is no pair, or a word without tokens."""
        pairs = Pairs(listed(self.attributes, "attributes"), listed(self.objects, "objects"), self.pattern)
        pairs.indices(self.names)
        start = torch.stack([_start(model, word) for word in (*pairs.attributes, *pairs.objects)])
        return CompositionalPrompts(self.names, pairs, start, template=self.template, dropout=self.dropout)


def _start(model: "DualEncoder", word: str) -> Float[Tensor, " W"]:
    found = word_vectors(model.text_tower, model.tokenizer, word)
    if not len(found):
        raise ConfigError(f"no token in {word!r} · model.adapters: attributes and objects · write a word")
    return found.mean(0).cpu()


@dataclass(frozen=True)
class Pairs:
    """Which parts names are made of."""

    attributes: tuple[str, ...]
    objects: tuple[str, ...]
    pattern: str

    @cached_property
    def numbers(self) -> dict[str, list[tuple[int, int]]]:
        """The numbers of an attribute and an object, by the name of the pair; a name may be read in two ways."""
        found: dict[str, list[tuple[int, int]]] = {}
        for first, attribute in enumerate(self.attributes):
            for second, thing in enumerate(self.objects):
                name = self.pattern.replace(_PARTS[0], attribute).replace(_PARTS[1], thing)
                found.setdefault(name, []).append((first, second))
        return found

    def indices(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """The pairs of some names. Raises ConfigError for one that is no pair, or two."""
        for name in names:
            if (count := len(self.numbers.get(name, ()))) != 1:
                raise ConfigError(
                    f"class {name!r} is {'no pair' if not count else f'{count} pairs'} of an attribute and an object · "
                    "attributes, objects, pattern · name both parts"
                )
        return [self.numbers[name][0] for name in names]


class CompositionalPrompts(ClassPrompts):
    """A vector for each attribute and each object."""

    def __init__(
        self, names: Sequence[str], pairs: Pairs, start: Float[Tensor, "N W"], *, template: str, dropout: float
    ) -> None:
        super().__init__(names)
        self.pairs = pairs
        self.template = template
        self.words = nn.Embedding.from_pretrained(start, freeze=False)
        self.dropout = nn.Dropout(dropout)
        self.swapped = template.index(_PARTS[0]) > template.index(_PARTS[1])

    def prompts(self, names: Sequence[str]) -> list[str]:
        """See ClassPrompts: the same for all, what differs are the vectors."""
        written = self.template
        for part in _PARTS:
            written = written.replace(part, SLOT)
        return [written] * len(names)

    def read(self, model: "DualEncoder", image_features: Float[Tensor, "B D"], names: Sequence[str]) -> ClassReading:
        """See ClassPrompts. Raises ConfigError for a name that is no pair of a known attribute and object."""
        rows = torch.tensor(self.pairs.indices(names), device=self.words.weight.device)
        rows[:, 1] += len(self.pairs.attributes)
        vectors = self.dropout(self.words.weight)[rows.flip(1) if self.swapped else rows]
        return ClassReading(self.encode(model, self.texts(model, names), vectors), image_features)

    def vectors(self) -> dict[str, Float[Tensor, "M W"]]:
        """See ClassPrompts."""
        return dict(zip((*self.pairs.attributes, *self.pairs.objects), self.words.weight[:, None], strict=True))
