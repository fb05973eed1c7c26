"""Synonyms from WordNet, through nltk and the data that its user has downloaded."""

import importlib
from functools import cache
from typing import Any

from diptych.errors import ConfigError


def load_synonyms() -> Any:
    """WordNet's corpus reader.

    Raises:
        ConfigError: nltk or its WordNet is not there.
    """
    try:
        wordnet = importlib.import_module("nltk.corpus").wordnet
        wordnet.synsets("dog")
    except (ImportError, LookupError):
        raise ConfigError(
            "no WordNet · synonyms=wordnet · pip install nltk and python -m nltk.downloader wordnet, or leave it out"
        ) from None
    return wordnet


@cache
def related(word: str) -> frozenset[str]:
    """Words that share a meaning with a word, or name something more or less general."""
    found: set[str] = set()
    for synset in load_synonyms().synsets(word):
        for near in (synset, *synset.hypernyms(), *synset.hyponyms()):
            found.update(name.replace("_", " ").lower() for name in near.lemma_names())
    return frozenset(found)


def are_related(one: str, other: str) -> bool:
    """Whether two words may be true of the same picture by WordNet."""
    return other in related(one) or one in related(other)
