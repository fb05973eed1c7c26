"""More true captions: parts of a caption in growing order (CompA's modular form, arXiv:2310.08753), and paraphrases."""

from collections.abc import Iterator
from itertools import pairwise

from diptych_data.negatives.lexicon import Lexicon, Meaning
from diptych_data.negatives.phrase import Phrase, Slot, replaced, with_articles
from diptych_data.negatives.words import Token, normal

_LEFT_OUT = ("colour", "tone", "count")
_NEGATIONS = frozenset(("no", "not", "without", "never", "nothing", "none", "neither", "isn’t", "isn't"))


def sub_captions(phrase: Phrase) -> list[str]:
    """Beginnings of a caption, each longer by a piece, from the bare thing to all but the whole.

    “a brown dog on a sofa near a window” → a dog · a brown dog · a brown dog on a sofa. A caption that denies
    something has none: a part of it may say what the whole denies.
    """
    if _NEGATIONS.intersection(token.low for token in phrase.tokens):
        return []
    texts = [phrase.text[: phrase.tokens[end - 1].end] for end in _cuts(phrase)]
    first = texts[0] if texts else phrase.text
    found = [bare] if (bare := _bare(phrase, first)) else []
    whole = normal(phrase.text)
    return list({normal(text): text for text in [*found, *texts] if normal(text) not in ("", whole)}.values())


def _cuts(phrase: Phrase) -> Iterator[int]:
    """Numbers of tokens that make a piece: cuts are made before a connective and at marks."""
    inside = {place for slot in phrase.slots for place in range(slot.first + 1, slot.last)}
    lows = [token.low for token in phrase.tokens]
    pieces = {piece for piece in phrase.lexicon.pieces if " " not in piece}
    phrases = [tuple(piece.split()) for piece in phrase.lexicon.pieces if " " in piece]
    for place in range(1, len(lows)):
        if place in inside or lows[place - 1] in pieces:
            continue
        if lows[place] in pieces or any(tuple(lows[place : place + len(words)]) == words for words in phrases):
            yield place


def _bare(phrase: Phrase, first: str) -> str:
    """The first piece without colour, tone and number; empty where nothing is to be left out."""
    gone = [slot for slot in phrase.slots if slot.type in _LEFT_OUT and phrase.tokens[slot.last - 1].end < len(first)]
    if not gone or any(slot.type == "count" for slot in gone):
        return ""
    dropped = {place for slot in gone for place in range(slot.first, slot.last)}
    kept = [token for place, token in enumerate(phrase.tokens) if place not in dropped and token.end <= len(first)]
    return _joined(phrase.text, kept) if any(token.is_word for token in kept) else ""


def _joined(text: str, tokens: list[Token]) -> str:
    parts = [tokens[0].text]
    for one, other in pairwise(tokens):
        parts += ["" if text[one.end : other.start] == "" else " ", other.text]
    return with_articles("".join(parts))


def paraphrases(phrase: Phrase, lexicon: Lexicon) -> list[str]:
    """The caption in other words: words that mean the same, and “with” in place of a colon before a tone."""
    found = [*_other_words(phrase, lexicon), *_without_colon(phrase)]
    return list({normal(text): text for text in found if normal(text) != normal(phrase.text)}.values())


def _other_words(phrase: Phrase, lexicon: Lexicon) -> Iterator[str]:
    for slot in phrase.slots:
        for group in lexicon.paraphrases:
            if slot.meaning.word in group:
                for word in group:
                    other = Slot(slot.first, slot.last, Meaning(slot.meaning.category, word, slot.meaning.is_plural))
                    text = replaced(phrase, other, word) if word != slot.meaning.word else None
                    if text is not None:
                        yield text


def _without_colon(phrase: Phrase) -> Iterator[str]:
    for slot in phrase.slots:
        before = phrase.tokens[slot.first - 1] if slot.first else None
        if slot.type == "tone" and before is not None and before.text == ":":
            yield phrase.text[: before.start] + " with" + phrase.text[before.end :]
