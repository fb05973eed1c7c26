"""A caption with the words in it whose meaning is known."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from diptych_data.negatives.lexicon import Category, Lexicon, Meaning
from diptych_data.negatives.words import Token, article, in_case_of, looks_plural, tokens_of

Tagger = Callable[[Sequence[str]], Sequence[str]]
"""Words → their parts of speech, in Penn's names: NN, NNS, JJ, …"""


@dataclass(frozen=True)
class Slot:
    """A run of tokens that means something."""

    first: int
    last: int
    """Behind its last token."""
    meaning: Meaning

    @property
    def type(self) -> str:
        """Of its category."""
        return self.meaning.category.type


@dataclass(frozen=True)
class Phrase:
    """A caption taken apart."""

    text: str
    tokens: tuple[Token, ...]
    slots: tuple[Slot, ...]
    lexicon: Lexicon

    def part(self, slot: Slot) -> str:
        """The slot's text."""
        return self.text[self.tokens[slot.first].start : self.tokens[slot.last - 1].end]

    def between(self, one: Slot, other: Slot) -> tuple[Token, ...]:
        """The tokens from one slot to a later one."""
        return self.tokens[one.last : other.first]

    def after(self, place: int) -> Token | None:
        """The token at `place`, if there is one."""
        return self.tokens[place] if place < len(self.tokens) else None


def parse(text: str, lexicon: Lexicon, tag: Tagger | None = None) -> Phrase:
    """Takes a caption apart: the longest phrases that the lexicon knows; with a tagger, other nouns too."""
    tokens = tokens_of(text)
    slots = list(_known(tokens, lexicon))
    if tag is not None and tokens:
        slots = sorted([*slots, *_tagged(tokens, slots, tag, lexicon)], key=lambda slot: slot.first)
    return Phrase(text, tokens, tuple(slots), lexicon)


def _known(tokens: Sequence[Token], lexicon: Lexicon) -> Iterator[Slot]:
    place = 0
    while place < len(tokens):
        slot = _longest(tokens, place, lexicon)
        if slot is not None:
            yield slot
        place = slot.last if slot is not None else place + 1


def _longest(tokens: Sequence[Token], first: int, lexicon: Lexicon) -> Slot | None:
    for last in range(min(first + lexicon.longest, len(tokens)), first, -1):
        words = tuple(token.low for token in tokens[first:last])
        for meaning in lexicon.meanings.get(words, ()):
            if _fits(meaning.category, tokens, first, last, lexicon.function_words):
                return Slot(first, last, meaning)
    return None


def _fits(category: Category, tokens: Sequence[Token], first: int, last: int, function_words: frozenset[str]) -> bool:
    following = tokens[last] if last < len(tokens) else None
    next_word = following.low if following is not None else ""
    if category.before_word and (following is None or not following.is_word or next_word in function_words):
        return False
    if category.before is not None and next_word not in category.before:
        return False
    if category.after is not None and (first == 0 or tokens[first - 1].low not in category.after):
        return False
    if category.whole and not (first and tokens[first - 1].is_word and following is not None and following.is_word):
        return False
    return next_word not in category.not_before


def _tagged(tokens: Sequence[Token], known: Sequence[Slot], tag: Tagger, lexicon: Lexicon) -> Iterator[Slot]:
    """Nouns that no slot holds."""
    taken = {place for slot in known for place in range(slot.first, slot.last)}
    unknown = Category("unknown", "object", lexicon.open_words())
    for place, (token, kind) in enumerate(zip(tokens, tag([token.text for token in tokens]), strict=True)):
        if place not in taken and token.is_word and kind in ("NN", "NNS") and token.low not in lexicon.function_words:
            yield Slot(
                place, place + 1, Meaning(unknown, token.low, is_plural=kind == "NNS" and looks_plural(token.low))
            )


def replaced(phrase: Phrase, slot: Slot, word: str) -> str | None:
    """The caption with another word in a slot: number, capital and article fit. None where no article would."""
    new = phrase.lexicon.inflected(word) if slot.meaning.is_plural else word
    start, end = phrase.tokens[slot.first].start, phrase.tokens[slot.last - 1].end
    before = phrase.tokens[slot.first - 1] if slot.first else None
    if before is not None and before.low in ("a", "an"):
        if looks_plural(new.rsplit(" ", 1)[-1]):
            return None
        fitting = in_case_of(article(new), before.text)
        return phrase.text[: before.start] + fitting + phrase.text[before.end : start] + new + phrase.text[end:]
    if slot.first == 0:
        new = in_case_of(new, phrase.part(slot)) if not slot.meaning.word[:1].isupper() else new
    return phrase.text[:start] + new + phrase.text[end:]


def exchanged(phrase: Phrase, one: Slot, other: Slot) -> str:
    """The caption with two slots in each other's place."""
    a, b = phrase.part(one), phrase.part(other)
    if one.first == 0:
        a, b = (a[:1].lower() + a[1:], in_case_of(b, a)) if a[:1].isupper() and not b[:1].isupper() else (a, b)
    starts = [phrase.tokens[slot.first].start for slot in (one, other)]
    ends = [phrase.tokens[slot.last - 1].end for slot in (one, other)]
    text = phrase.text
    return with_articles(text[: starts[0]] + b + text[ends[0] : starts[1]] + a + text[ends[1] :])


def with_articles(text: str) -> str:
    """Every “a” and “an” as the word behind it asks for."""
    tokens = tokens_of(text)
    parts, at = [], 0
    for token, following in itertools.pairwise(tokens):
        if token.low in ("a", "an") and following.is_word:
            parts += [text[at : token.start], in_case_of(article(following.text), token.text)]
            at = token.end
    return "".join([*parts, text[at:]])
