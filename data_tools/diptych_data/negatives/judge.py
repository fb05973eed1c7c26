"""Which proposed negatives are none: true after all, or no caption."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from diptych.data.captions import clean
from diptych_data.negatives.lexicon import Lexicon
from diptych_data.negatives.words import normal, words_of

Reason = Literal["", "empty", "too_long", "repeated", "equal", "synonymous", "mentioned", "twice"]
Alike = Callable[[str, str], bool]
"""Whether two words may be true of the same picture."""

_LIST = re.compile(r"[,;:]|\b(?:and|or)\b")
_MAX_CHARS = 1000


class Judge:
    """Knows all true captions of one picture; sees each negative once."""

    def __init__(self, truths: Iterable[str], lexicon: Lexicon, alike: Alike) -> None:
        texts = list(truths)
        self._alike = alike
        self._function_words = lexicon.function_words
        self._seen: set[str] = set()
        self._truths = {normal(text) for text in texts}
        self._unordered = {_unordered(text) for text in texts}
        self._words = {word for text in texts for word in words_of(text)}
        self._by_length: dict[int, list[tuple[str, ...]]] = {}
        for truth in sorted(self._truths):
            words = tuple(truth.split())
            self._by_length.setdefault(len(words), []).append(words)

    def reason(self, text: str, of: str) -> Reason:
        """Why a text is not to be taken for a negative; empty: it may be."""
        return broken(text, of) or self._true(text, of) or self._again(text)

    def _true(self, text: str, of: str) -> Reason:
        plain = normal(text)
        if plain in self._truths:
            return "equal"
        if _unordered(text) in self._unordered or self._says_the_same(tuple(plain.split())):
            return "synonymous"
        new = set(words_of(text)) - set(words_of(of)) - self._function_words
        return "mentioned" if new & self._words else ""

    def _says_the_same(self, words: tuple[str, ...]) -> bool:
        return any(
            all(one == other or self._alike(one, other) for one, other in zip(words, truth, strict=True))
            for truth in self._by_length.get(len(words), ())
        )

    def _again(self, text: str) -> Reason:
        plain = normal(text)
        if plain in self._seen:
            return "twice"
        self._seen.add(plain)
        return ""


def broken(text: str, of: str) -> Reason:
    """Why a text is no caption that somebody would write in the place of `of`; empty: it is one."""
    if len(text) > min(_MAX_CHARS, max(60, 3 * len(of))):
        return "too_long"
    words = words_of(text)
    if not any(word[0].isalnum() for word in words) or clean(text) != text:
        return "empty"
    known = Counter(words_of(of))
    counts = Counter(word for word in words if word[0].isalnum())
    if any(count > max(3, 2 * known[word]) for word, count in counts.items()) or _stutters(words, words_of(of)):
        return "repeated"
    return ""


def _stutters(words: tuple[str, ...], of: tuple[str, ...]) -> bool:
    """Whether a word stands twice in a row that the caption has not so."""
    doubles = {one for one, other in itertools.pairwise(of) if one == other}
    return any(one == other and one[0].isalpha() and one not in doubles for one, other in itertools.pairwise(words))


def _unordered(text: str) -> tuple[str, ...]:
    """The parts of an enumeration in sorted order."""
    return tuple(sorted(part for piece in _LIST.split(text.casefold()) if (part := normal(piece))))
