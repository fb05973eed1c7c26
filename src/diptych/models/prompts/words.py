"""The words that learned vectors have come to lie near."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from diptych.errors import ConfigError
from diptych.models.prompts.splice import vocabulary

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Near:
    """A learned vector and its neighbours."""

    name: str
    """What the vector stands for: `context`, or the class, attribute, object or template that it belongs to."""
    place: int
    """Which vector of it, from 0."""
    norm: float
    """Its Euclidean length; words have that of their embeddings."""
    words: tuple[tuple[str, float], ...]
    """The nearest tokens as the tokenizer writes them, nearest first, each with its cosine."""


@torch.no_grad()
def nearest(model: "DualEncoder", count: int = 5) -> list[Near]:
    """For each vector that a model's prompts of classes put among words, the `count` tokens whose embeddings have the
    largest cosine with it.

    A cosine near 0 says that the vector is no word: neighbours are then a hint at most (arXiv:2109.01134).

    Raises:
        ConfigError: nothing that the model learned stands among words.
    """
    if count < 1:
        raise ConfigError(f"{count} words of a vector · count · ask for one or more")
    learned = model.class_prompts.vectors() if model.class_prompts is not None else {}
    if not learned:
        raise ConfigError(
            "no learned vector stands among words · model.adapters · open a run with prompts of classes such as context"
        )
    words = F.normalize(vocabulary(model.text_tower).weight.float(), dim=-1)
    found = []
    for name, vectors in learned.items():
        cosines = F.normalize(vectors.float(), dim=-1) @ words.T
        best = cosines.topk(min(count, len(words)), dim=1)
        for place, (values, rows) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            pairs = tuple((model.tokenizer.word(row), value) for row, value in zip(rows, values, strict=True))
            found.append(Near(name, place, float(vectors[place].norm()), pairs))
    return found
