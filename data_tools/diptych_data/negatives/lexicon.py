"""Words by category, from `lexicon.json` and a user's file of the same form: what may stand in for what.

A category has a `type` (object, colour, count, …), its `words`, and conditions on where they are read so:

    before_word   a word follows that is no function word: “orange” is a colour in “orange book”
    before        one of these words follows
    not_before    none of these follows
    after         one of these stands in front
    whole         words stand on both sides
    unlikely      attributes that its members hardly have; a category with this key is open: any word of any open
                  category may replace a noun that nobody knows
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from diptych.errors import ConfigError
from diptych_data.negatives.words import plural, words_of


@dataclass(frozen=True)
class Category:
    """Words of which one can replace another."""

    name: str
    type: str
    words: tuple[str, ...]
    before_word: bool = False
    before: frozenset[str] | None = None
    not_before: frozenset[str] = frozenset()
    after: frozenset[str] | None = None
    whole: bool = False
    unlikely: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Meaning:
    """One reading of a phrase."""

    category: Category
    word: str
    """As the category lists it."""
    is_plural: bool


@dataclass(frozen=True)
class Lexicon:
    """All categories, and what else is known about words."""

    categories: Mapping[str, Category]
    symmetric: frozenset[str]
    """Between two things that may change places without a change of meaning."""
    function_words: frozenset[str]
    pieces: tuple[str, ...]
    """Where a caption is cut into sub-captions."""
    irregular: Mapping[str, str]
    """Singular → plural."""
    synonyms: Mapping[str, frozenset[str]]
    """Word → words that may be true of the same picture."""
    paraphrases: tuple[tuple[str, ...], ...]
    meanings: Mapping[tuple[str, ...], tuple[Meaning, ...]] = field(repr=False)
    """Words of a phrase in lower case → its readings, in the order of the categories."""
    longest: int
    """Words of the longest phrase."""

    def are_alike(self, one: str, other: str) -> bool:
        """Whether two words may be true of the same picture."""
        return one == other or other in self.synonyms.get(one, ())

    def open_words(self) -> tuple[str, ...]:
        """Nouns that may replace one of unknown kind."""
        return tuple(word for one in self.categories.values() if one.unlikely is not None for word in one.words)

    def inflected(self, word: str) -> str:
        """The plural."""
        return plural(word, self.irregular)


@cache
def read_lexicon(path: Path | None = None) -> Lexicon:
    """The built-in lexicon, with the file at `path` laid over it: its categories replace those of the same name,
    its other lists are added.

    Raises:
        ConfigError: the file is no lexicon.
    """
    document = json.loads((resources.files("diptych_data.negatives") / "lexicon.json").read_text(encoding="utf-8"))
    if path is None:
        return _lexicon(document)
    try:
        return _lexicon(_laid_over(document, json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"no lexicon ({type(error).__name__}: {error}) · {path} · write it as diptych_data/negatives/lexicon.json"
        ) from error


def _laid_over(document: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    if unknown := set(more) - set(document):
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
    merged = dict(document)
    for name, value in more.items():
        match document[name]:
            case dict():
                merged[name] = document[name] | value
            case list():
                merged[name] = [*document[name], *value]
    return merged


def _lexicon(document: Mapping[str, Any]) -> Lexicon:
    categories = {name: _category(name, given) for name, given in document["categories"].items()}
    irregular = dict(document["irregular"])
    meanings = _meanings(categories.values(), irregular)
    return Lexicon(
        categories,
        symmetric=frozenset(document["symmetric"]),
        function_words=frozenset(document["function_words"]),
        pieces=tuple(document["pieces"]),
        irregular=irregular,
        synonyms=_synonyms(document["synonyms"], document["paraphrases"]),
        paraphrases=tuple(map(tuple, document["paraphrases"])),
        meanings=meanings,
        longest=max(map(len, meanings)),
    )


def _category(name: str, given: Mapping[str, Any]) -> Category:
    before, after = (frozenset(given[key]) if key in given else None for key in ("before", "after"))
    unlikely = tuple(given["unlikely"]) if "unlikely" in given else None
    words = tuple(dict.fromkeys(given["words"]))
    if not words or not all(isinstance(word, str) and words_of(word) for word in words):
        raise ValueError(f"category {name!r} needs a list of words")
    return Category(
        name,
        str(given["type"]),
        words,
        before_word=bool(given.get("before_word")),
        before=before,
        not_before=frozenset(given.get("not_before", ())),
        after=after,
        whole=bool(given.get("whole")),
        unlikely=unlikely,
    )


def _meanings(
    categories: Iterable[Category], irregular: Mapping[str, str]
) -> dict[tuple[str, ...], tuple[Meaning, ...]]:
    found: dict[tuple[str, ...], list[Meaning]] = defaultdict(list)
    for category in categories:
        for word in category.words:
            found[words_of(word)].append(Meaning(category, word, is_plural=False))
            many = plural(word, irregular)
            if category.unlikely is not None and many != word:
                found[words_of(many)].append(Meaning(category, word, is_plural=True))
    return {words: tuple(readings) for words, readings in found.items()}


def _synonyms(*lists: Iterable[Iterable[str]]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for groups in lists:
        for group in map(tuple, groups):
            for word in group:
                found[word].update(group)
    return {word: frozenset(alike - {word}) for word, alike in found.items()}
