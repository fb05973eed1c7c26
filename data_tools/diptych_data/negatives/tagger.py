"""Parts of speech from TextBlob, whose pattern tagger brings its own lexicon: nothing is downloaded."""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from diptych.errors import ConfigError
from diptych_data.negatives.phrase import Tagger


def load_tagger() -> Tagger:
    """Words → parts of speech.

    Raises:
        ConfigError: TextBlob is not installed.
    """
    tagger = _pattern_tagger()

    def tag(words: Sequence[str]) -> list[str]:
        # The tagger leaves out marks where it is asked for tokens; word by word, places stay.
        tagged = tagger.tag(" ".join(words), tokenize=False)
        kinds = dict(tagged)
        return [kinds.get(word, "") for word in words]

    return tag


@cache
def _pattern_tagger() -> Any:
    try:
        return importlib.import_module("textblob.en.taggers").PatternTagger()
    except ImportError:
        raise ConfigError(
            "TextBlob is not installed · tagger=textblob · pip install 'diptych[negatives]', or leave the tagger out"
        ) from None
