"""Which writing systems a text uses, from the names of its letters in Unicode."""

import unicodedata
from collections import Counter
from functools import lru_cache

_FORMS = frozenset({"FULLWIDTH", "HALFWIDTH", "MODIFIER", "MATHEMATICAL", "DOUBLE-STRUCK", "SUPERSCRIPT", "SUBSCRIPT"})
"""Words in front of the script in a letter's name."""
_NAMES = {"CJK": "Han", "HANGUL": "Hangul", "MICRO": "Greek", "FEMININE": "Latin", "MASCULINE": "Latin"}


@lru_cache(maxsize=65536)
def script(letter: str) -> str:
    """`Latin`, `Han`, `Cyrillic`, …; empty for what is no letter: digits, signs, emoji."""
    if unicodedata.category(letter)[0] != "L":
        return ""
    for word in unicodedata.name(letter, "").split():
        if word not in _FORMS:
            return _NAMES.get(word, word.title())
    return "Unknown"


def letters(text: str) -> Counter[str]:
    """Letters of a text by script."""
    found: Counter[str] = Counter()
    if text.isascii():
        found["Latin"] = sum(map(str.isalpha, text))
        return +found
    for letter, count in Counter(text).items():
        if name := script(letter):
            found[name] += count
    return found


def main_script(found: Counter[str]) -> str:
    """The script of most letters, among equals the first by name; `none` where there are no letters."""
    return min(found, key=lambda name: (-found[name], name)) if found else "none"
