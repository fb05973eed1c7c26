"""Optional changes of a training caption. To add one: a field, and a line in `augment_text`."""

import re
from dataclasses import dataclass

import numpy as np

from diptych.config import Config

_SENTENCE = re.compile(r"(?<=[.!?;。！？；])\s+|(?<=[。！？；])")


@dataclass(frozen=True)
class TextAugmentConfig(Config):
    """Which changes are made. Everything is off by default."""

    sub_caption: float = 0.0
    """Probability that only a run of the caption's sentences is kept, of random length and place."""
    word_dropout: float = 0.0
    """Probability that a word is left out, for each by itself; one always stays."""

    def __post_init__(self) -> None:
        for name in ("sub_caption", "word_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], not {getattr(self, name)}")


def augment_text(caption: str, config: TextAugmentConfig, rng: np.random.Generator) -> str:
    """The changed caption."""
    if config.sub_caption and rng.random() < config.sub_caption:
        caption = _some_sentences(caption, rng)
    if config.word_dropout:
        caption = _without_words(caption, config.word_dropout, rng)
    return caption


def _some_sentences(caption: str, rng: np.random.Generator) -> str:
    sentences = [sentence for sentence in _SENTENCE.split(caption) if sentence]
    if len(sentences) < 2:
        return caption
    length = int(rng.integers(1, len(sentences)))
    first = int(rng.integers(len(sentences) - length + 1))
    return " ".join(sentences[first : first + length])


def _without_words(caption: str, probability: float, rng: np.random.Generator) -> str:
    words = caption.split(" ")
    kept = rng.random(len(words)) >= probability
    kept[int(rng.integers(len(words)))] |= not kept.any()
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)
