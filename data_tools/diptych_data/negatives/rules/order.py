"""The same words in another order."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from diptych_data.negatives.phrase import Phrase, with_articles
from diptych_data.negatives.rules.family import Proposal, Rule
from diptych_data.negatives.words import Token

_LISTS = frozenset((",", ";", ":", "/", "and", "or", "&", "but", "not", "no"))


@dataclass(frozen=True)
class Order(Rule, name="order"):
    """Two content words change places, whatever they are: “cat with tears of joy” → “joy with tears of cat”.

    Only around a function word with a direction, since “circle purple” is a purple circle still, and a straw with a cup
    a cup with a straw; not over a comma or “and”; and no words of gender, nor words that mean something together.
    Source: the order tests of ARO (arXiv:2210.01936). Easily told by grammar: the blind test decides what is left.
    """

    per_caption: int = 4
    """Pairs tried."""

    def propose(self, phrase: Phrase, rng: np.random.Generator) -> Iterator[Proposal]:
        """Some pairs of words."""
        fixed = {
            place
            for slot in phrase.slots
            if slot.type == "gender" or slot.last - slot.first > 1
            for place in range(slot.first, slot.last)
        }
        words = [
            (place, token)
            for place, token in enumerate(phrase.tokens)
            if token.is_word and place not in fixed and token.low not in phrase.lexicon.function_words
        ]
        pairs = [(a, b) for (i, a), (j, b) in combinations(words, 2) if self._matters(phrase, i, j)]
        for place in rng.permutation(len(pairs))[: self.per_caption]:
            yield Proposal(_exchanged(phrase.text, *pairs[place]), "order")

    def _matters(self, phrase: Phrase, one: int, other: int) -> bool:
        between = [token.low for token in phrase.tokens[one + 1 : other]]
        lexicon = phrase.lexicon
        return not _LISTS.intersection(between) and bool(
            lexicon.function_words.difference(lexicon.symmetric).intersection(between)
        )


def _exchanged(text: str, one: Token, other: Token) -> str:
    parts = (text[: one.start], other.text, text[one.end : other.start], one.text, text[other.end :])
    return with_articles("".join(parts))
