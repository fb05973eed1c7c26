"""From a sample's texts to the one caption it is trained with."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diptych.config import Config
from diptych.data.faults import UnusableSample

Captions = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class CaptionView(Config):
    """One way of making a caption."""

    columns: tuple[str, ...] = ("txt",)
    """Columns whose texts are taken; `txt` is the sample's .txt member."""
    weight: float = 1.0
    """How often this view is chosen, relative to the others."""
    max_texts: int = 1
    """Texts drawn at random from each column after the first; the first column gives one."""
    separator: str = ", "
    """What joins several texts."""
    templates: tuple[str, ...] = ("{}",)
    """One is drawn at random; `{}` is the caption."""

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("columns must name at least one column")
        if self.weight <= 0 or self.max_texts < 1:
            raise ValueError("weight must be positive and max_texts at least 1")
        if bad := [template for template in self.templates if "{}" not in template]:
            raise ValueError(f"template {bad[0]!r} has no {{}} for the caption")


@dataclass(frozen=True)
class HardCaptionConfig(Config):
    """Wrong captions that were written for a picture."""

    column: str
    """Column of the JSON member's captions that holds them."""
    count: int = 4
    """Texts per picture and step: drawn without repetition, or with it where the column has fewer."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, not {self.count}")


@dataclass(frozen=True)
class CaptionConfig(Config):
    """Which caption a picture is trained with."""

    views: tuple[CaptionView, ...] = (CaptionView(),)
    """Drawn by weight for every sample and epoch."""
    max_chars: int = 1000
    """Longer captions are cut here before tokenising."""
    hard: HardCaptionConfig | None = None
    """Wrong captions beside the right one, for the objective's terms that use them; none: no such captions."""


@lru_cache(maxsize=65536)
def clean(text: str, *, max_chars: int = 1000) -> str:
    """Unicode NFC, control characters and runs of white space become single spaces, cut to `max_chars`."""
    text = unicodedata.normalize("NFC", text[: 4 * max_chars])
    printable = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
    return " ".join(printable.split())[:max_chars].rstrip()


def read(members: Mapping[str, bytes]) -> dict[str, tuple[str, ...]]:
    """A sample's texts by column: `txt`, and the columns of its JSON member's `captions`.

    Raises:
        UnusableSample: `bad_caption`, the bytes are no UTF-8 or no JSON map.
    """
    columns: dict[str, tuple[str, ...]] = {}
    try:
        if "txt" in members:
            columns["txt"] = (members["txt"].decode("utf-8"),)
        if "json" in members:
            document = json.loads(members["json"])
            for column, texts in document.get("captions", {}).items():
                columns[column] = (texts,) if isinstance(texts, str) else tuple(str(text) for text in texts)
    except (UnicodeDecodeError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UnusableSample("bad_caption", str(error)) from error
    return columns


def choose(captions: Captions, config: CaptionConfig, rng: np.random.Generator) -> str:
    """One caption by the rules of `config`.

    Raises:
        UnusableSample: `no_caption`, no view finds a text.
    """
    possible = [view for view in config.views if any(_texts(captions, column) for column in view.columns)]
    if not possible:
        raise UnusableSample("no_caption")
    point = rng.random() * sum(view.weight for view in possible)
    view = possible[-1]
    for candidate in possible:
        if point < candidate.weight:
            view = candidate
            break
        point -= candidate.weight
    parts: list[str] = []
    for number, column in enumerate(view.columns):
        texts = _texts(captions, column)
        wanted = 1 if number == 0 else int(rng.integers(1, view.max_texts + 1))
        parts += texts if len(texts) == 1 else [texts[i] for i in rng.permutation(len(texts))[:wanted]]
    template = view.templates[int(rng.integers(len(view.templates)))] if len(view.templates) > 1 else view.templates[0]
    caption = clean(template.replace("{}", view.separator.join(parts)), max_chars=config.max_chars)
    if not caption:
        raise UnusableSample("no_caption")
    return caption


def choose_hard(captions: Captions, config: CaptionConfig, rng: np.random.Generator) -> tuple[str, ...]:
    """The hard captions of a step; none where none are configured.

    Raises:
        UnusableSample: `no_hard_caption`, the column has no text.
    """
    if config.hard is None:
        return ()
    texts = [clean(text, max_chars=config.max_chars) for text in _texts(captions, config.hard.column)]
    texts = [text for text in texts if text]
    if not texts:
        raise UnusableSample("no_hard_caption")
    count = config.hard.count
    chosen = rng.permutation(len(texts))[:count] if len(texts) >= count else rng.integers(len(texts), size=count)
    return tuple(texts[i] for i in chosen)


def _texts(captions: Captions, column: str) -> list[str]:
    return [text for text in captions.get(column, ()) if text.strip()]
