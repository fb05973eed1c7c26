"""Something more is said, which is not so."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diptych_data.negatives.phrase import Phrase, Slot, with_articles
from diptych_data.negatives.rules.family import Proposal, Rule, drawn
from diptych_data.negatives.words import article, in_case_of, looks_plural


@dataclass(frozen=True)
class Add(Rule, name="add"):
    """An attribute that things of this kind hardly have (“checkered lion”), or a second thing (“lion and drum”).

    Whether “red” is wrong for a fox no lexicon knows; so attributes come from the category's own list of unlikely ones.
    Source: SugarCrepe's add (arXiv:2306.14610).
    """

    per_slot: int = 2
    """Attributes, and things, tried for one word."""

    def propose(self, phrase: Phrase, rng: np.random.Generator) -> Iterator[Proposal]:
        """For each known thing."""
        for slot in phrase.slots:
            if slot.meaning.category.unlikely is None:
                continue
            if not slot.first or not _is_described(phrase, slot):
                for attribute in drawn(slot.meaning.category.unlikely, self.per_slot, rng):
                    yield Proposal(_with_attribute(phrase, slot, attribute), "attribute")
            if slot.last == len(phrase.tokens) and not any(token.text == ":" for token in phrase.tokens):
                yield from self._with_things(phrase, slot, rng)

    def _with_things(self, phrase: Phrase, slot: Slot, rng: np.random.Generator) -> Iterator[Proposal]:
        others = [
            word
            for category in phrase.lexicon.categories.values()
            if category.unlikely and category is not slot.meaning.category
            for word in category.words
            if not looks_plural(word)
        ]
        has_article = any(token.low in ("a", "an", "the") for token in phrase.tokens)
        for word in drawn(others, self.per_slot, rng):
            thing = f"{article(word)} {word}" if has_article else word
            yield Proposal(f"{phrase.text} and {thing}", "object")


def _is_described(phrase: Phrase, slot: Slot) -> bool:
    """Whether a word that may belong to the thing stands in front of it."""
    before = phrase.tokens[slot.first - 1]
    return before.is_word and before.low not in phrase.lexicon.function_words


def _with_attribute(phrase: Phrase, slot: Slot, attribute: str) -> str:
    start = phrase.tokens[slot.first].start
    rest = phrase.text[start:]
    if slot.first == 0 and rest[:1].isupper():
        attribute, rest = in_case_of(attribute, rest), rest[:1].lower() + rest[1:]
    return with_articles(f"{phrase.text[:start]}{attribute} {rest}")
