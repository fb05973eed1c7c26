"""The family of rules. To add one: a file here with a frozen dataclass `class Mine(Rule, name="mine")`."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diptych.config import Choice, discover
from diptych_data.negatives.phrase import Phrase


@dataclass(frozen=True)
class Proposal:
    """A text and what was changed to make it."""

    text: str
    type: str


class Rule(Choice):
    """A way to make a true caption false without a model."""

    @abstractmethod
    def propose(self, phrase: Phrase, rng: np.random.Generator) -> Iterator[Proposal]:
        """Texts that are likely wrong; what turns out to be true is sorted out later."""


def find_rules() -> None:
    """Makes the rules of this folder known."""
    discover(__package__)


def drawn(words: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """At most `count` of the words, in random order."""
    return [words[place] for place in rng.permutation(len(words))[:count]]
