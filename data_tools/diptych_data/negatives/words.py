"""Words of English, as far as rules need them: tokens, plurals, articles, capitals, and when two texts say the same."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

_TOKEN = re.compile(r"[^\W_]+(?:[’'.\-–][^\W_]+)*|[^\w\s]")
_ARTICLES = frozenset(("a", "an", "the"))
_VOWEL_BY_LETTER_ALONE = ("uni", "use", "one", "eu", "ufo")
"""Beginnings that are spelt with a vowel and spoken without one."""


@dataclass(frozen=True)
class Token:
    """A word or a mark of a caption."""

    text: str
    start: int
    end: int

    @property
    def is_word(self) -> bool:
        """Whether it is more than a mark."""
        return self.text[0].isalnum()

    @property
    def low(self) -> str:
        """In lower case."""
        return self.text.lower()


def tokens_of(text: str) -> tuple[Token, ...]:
    """The words and marks of a text with their places."""
    return tuple(Token(found.group(), found.start(), found.end()) for found in _TOKEN.finditer(text))


def words_of(text: str) -> tuple[str, ...]:
    """The tokens of a text in lower case."""
    return tuple(token.low for token in tokens_of(text))


def normal(text: str) -> str:
    """Equal for texts that differ in capitals, marks, articles, accents' encoding and white space alone."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return " ".join(token.text for token in tokens_of(folded) if token.is_word and token.text not in _ARTICLES)


def plural(word: str, irregular: Mapping[str, str]) -> str:
    """The plural of a noun or of a phrase that ends in one; what looks like a plural stays."""
    if word in irregular:
        return irregular[word]
    *front, last = word.rsplit(" ", 1)
    if last in irregular:
        return " ".join([*front, irregular[last]])
    if looks_plural(last):
        return word
    if last.endswith("y") and last[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s")


def looks_plural(word: str) -> bool:
    """Whether a word ends like a plural."""
    return word.endswith("s") and not word.endswith(("ss", "us", "is", "’s", "'s"))


def article(word: str) -> str:
    """“a” or “an”."""
    low = word.lower()
    return "an" if low[:1] in "aeiou" and not low.startswith(_VOWEL_BY_LETTER_ALONE) else "a"


def in_case_of(word: str, model: str) -> str:
    """The word with a capital where the word in whose place it stands has one and it has none by itself."""
    shouts = len(model) > 1 and model.isupper()
    return word[:1].upper() + word[1:] if model[:1].isupper() and not shouts else word
