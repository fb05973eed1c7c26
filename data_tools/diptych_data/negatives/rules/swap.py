"""Two words change places."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from diptych_data.negatives.phrase import Phrase, Slot, exchanged
from diptych_data.negatives.rules.family import Proposal, Rule


@dataclass(frozen=True)
class Swap(Rule, name="swap"):
    """Two words of one type change places: “black cat and white dog” → “white cat and black dog”.

    Objects do so only around a relation that has a direction (“dog chasing cat”), attributes only in front of
    different words; what changes nothing (“cat and dog”, “family: man, woman”) is left alone.
    Source: SugarCrepe's swap (arXiv:2306.14610), ARO's relations and attributes (arXiv:2210.01936).
    """

    def propose(self, phrase: Phrase, rng: np.random.Generator) -> Iterator[Proposal]:
        """Every pair of words that may."""
        for one, other in combinations(phrase.slots, 2):
            if one.type != other.type or phrase.lexicon.are_alike(one.meaning.word, other.meaning.word):
                continue
            if one.meaning.is_plural != other.meaning.is_plural:
                continue
            allowed = _around_a_relation if one.type == "object" else _before_different_words
            if allowed(phrase, one, other):
                yield Proposal(exchanged(phrase, one, other), one.type)


def _around_a_relation(phrase: Phrase, one: Slot, other: Slot) -> bool:
    between = [token.low for token in phrase.between(one, other)]
    text = f" {' '.join(between)} "
    return bool(between) and not any(f" {word} " in text for word in phrase.lexicon.symmetric)


def _before_different_words(phrase: Phrase, one: Slot, other: Slot) -> bool:
    first, second = phrase.after(one.last), phrase.after(other.last)
    if one.last == other.first or first is None or second is None or not (first.is_word and second.is_word):
        return False
    known = phrase.lexicon.function_words | phrase.lexicon.symmetric
    return first.low != second.low and first.low not in known and second.low not in known
