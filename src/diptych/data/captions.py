"""From a sample's texts to the one caption it is trained with."""

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np

from diptych.config import Config
from diptych.data.faults import UnusableSample
from diptych.data.text_augment import TextAugmentConfig, augment_text


@dataclass(frozen=True)
class Captions:
    """What a sample says of its picture."""

    columns: Mapping[str, tuple[str, ...]]
    """Its captions: `txt`, and those that the .json member holds under `captions` or `caption`."""
    document: Mapping[str, Any] = field(default_factory=dict)
    """The .json member; its other keys are columns for those who name them."""

    def texts(self, column: str) -> list[str]:
        """The texts of a column, blank ones included."""
        value = self.columns.get(column, self.document.get(column))
        values = value if isinstance(value, list | tuple) else (value,)
        return [text for text in values if isinstance(text, str)]

    def numbers(self, column: str) -> np.ndarray:
        """A list of numbers beside the captions or under `captions`: float64; empty where there is no such list."""
        nested = self.document.get("captions")
        value = nested[column] if isinstance(nested, dict) and column in nested else self.document.get(column)
        if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
            return np.empty(0)
        try:
            return np.asarray(value, np.float64)
        except OverflowError:
            return np.empty(0)


@dataclass(frozen=True)
class CaptionView(Config):
    """One way of making a caption."""

    columns: tuple[str, ...] = ("txt",)
    """Columns whose texts are taken; `txt` is the sample's .txt member, the others come from its .json member."""
    weight: float = 1.0
    """How often this view is chosen, relative to the others."""
    pick: Literal["random", "first", "weighted", "all"] = "random"
    """Which of several texts the first column gives: one at random, the first, one by `scores`, or all joined."""
    scores: str | None = None
    """For `weighted`: the list of numbers in the .json member that says how often each text is taken."""
    max_texts: int = 1
    """Texts drawn at random from each column after the first."""
    separator: str = ", "
    """What joins several texts."""
    templates: tuple[str, ...] = ("{}",)
    """One is drawn at random; `{}` is the caption."""

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("columns must name at least one column")
        if not 0 < self.weight < math.inf or self.max_texts < 1:
            raise ValueError("weight must be positive and max_texts at least 1")
        if (self.pick == "weighted") != (self.scores is not None):
            raise ValueError("pick: weighted and scores go together")
        if bad := [template for template in self.templates if "{}" not in template]:
            raise ValueError(f"template {bad[0]!r} has no {{}} for the caption")

    def in_language(self, language: str) -> Self:
        """With `{language}` replaced in the columns' names."""
        scores = self.scores.replace("{language}", language) if self.scores is not None else None
        columns = tuple(column.replace("{language}", language) for column in self.columns)
        return replace(self, columns=columns, scores=scores)


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
class PositiveCaptionConfig(Config):
    """Further right captions of a picture, such as parts of its caption."""

    columns: tuple[str, ...] = ("sub", "paraphrase")
    """Columns of the JSON member's captions that hold them."""
    count: int = 2
    """Texts per picture and step: drawn without repetition, or with it where there are fewer; the caption itself where
    there is none."""

    def __post_init__(self) -> None:
        if self.count < 1 or not self.columns:
            raise ValueError("count must be at least 1, and columns must name at least one column")


@dataclass(frozen=True)
class CaptionConfig(Config):
    """Which caption a picture is trained with."""

    views: tuple[CaptionView, ...] = (CaptionView(),)
    """Drawn by weight for every sample and epoch."""
    second_views: tuple[CaptionView, ...] = ()
    """A second caption of the same picture, drawn likewise, that only the objective's term `caption` reads, by its
    `view: second`; none: no second caption."""
    form: Literal["NFC", "NFKC"] = "NFC"
    """Unicode normalisation; NFKC also replaces full-width letters, ligatures and the like."""
    min_chars: int = 1
    """Shorter texts are passed over; a sample without others is unusable (`no_caption`)."""
    max_chars: int = 1000
    """Longer captions are cut here before tokenising."""
    augment: TextAugmentConfig = field(default_factory=TextAugmentConfig)
    """Changes of the caption; all off by default."""
    hard: HardCaptionConfig | None = None
    """Wrong captions beside the right one, for the objective's terms that use them; none: no such captions."""
    positive: PositiveCaptionConfig | None = None
    """Right captions beside the one, for the candidates `positive_captions`; none: no such captions."""

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("views must hold at least one view")
        if not 1 <= self.min_chars <= self.max_chars:
            raise ValueError("min_chars must lie between 1 and max_chars")

    def in_language(self, language: str) -> Self:
        """With `{language}` replaced in all columns' names."""
        views, second = (tuple(v.in_language(language) for v in views) for views in (self.views, self.second_views))
        hard = self.hard and replace(self.hard, column=self.hard.column.replace("{language}", language))
        positive = self.positive and replace(
            self.positive, columns=tuple(column.replace("{language}", language) for column in self.positive.columns)
        )
        return replace(self, views=views, second_views=second, hard=hard, positive=positive)


_MAX_BYTES = 4 << 20
"""Of a .txt or .json member: a list of a million empty maps takes a hundred times its size."""

# Control characters and the line separators that `str.split` would keep become spaces.
_SPACES = dict.fromkeys((*range(32), *range(127, 160), 8232, 8233), " ")


def clean(text: str, *, max_chars: int = 1000, form: Literal["NFC", "NFKC"] = "NFC") -> str:
    """Unicode-normalised, control characters and runs of white space become single spaces, cut to `max_chars`."""
    text = text.lstrip()[: 4 * max_chars]  # megabytes of text are not normalised to be thrown away
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON may hold, is no character
        text = unicodedata.normalize(form, text)
    if not text.isprintable():
        text = text.translate(_SPACES)
    return " ".join(text.split())[:max_chars].rstrip()


def read(members: Mapping[str, bytes]) -> dict[str, tuple[str, ...]]:
    """A sample's captions by column, as `Captions.columns`. Raises UnusableSample."""
    return dict(parse(members).columns)


def parse(members: Mapping[str, bytes]) -> Captions:
    """A sample's texts.

    Raises:
        UnusableSample: `bad_caption`, the bytes are no UTF-8 or no JSON map.
    """
    columns: dict[str, tuple[str, ...]] = {}
    try:
        if any(len(members.get(name, b"")) > _MAX_BYTES for name in ("txt", "json")):
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        if "txt" in members:
            columns["txt"] = (members["txt"].decode("utf-8-sig"),)
        document = json.loads(members["json"]) if "json" in members else {}
        if not isinstance(document, dict):
            raise TypeError("the JSON is no map")
        columns |= _columns(document)
    except (UnicodeDecodeError, ValueError, TypeError, RecursionError) as error:
        raise UnusableSample("bad_caption", str(error)) from error
    return Captions(columns, document)


def _columns(document: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Ours: `captions: {column: text or [text, ...]}`; others': `caption: text`, `captions: [text, ...]`."""
    nested = document.get("captions")
    found = nested if isinstance(nested, dict) else {"captions": nested} if nested else {}
    if "caption" in document:
        found = {"caption": document["caption"]} | found
    lists = {column: (texts,) if isinstance(texts, str) else texts for column, texts in found.items()}
    return {
        column: tuple(text for text in texts if isinstance(text, str))
        for column, texts in lists.items()
        if isinstance(texts, list | tuple) and (not texts or any(isinstance(text, str) for text in texts))
    }


def choose(captions: Captions, views: Sequence[CaptionView], config: CaptionConfig, rng: np.random.Generator) -> str:
    """One caption by the rules of `views`, cleaned and changed as `config` says.

    Raises:
        UnusableSample: `no_caption`, no view finds a text of `min_chars`.
    """
    found = {column: _usable(captions, column, config) for view in views for column in view.columns}
    possible = [view for view in views if any(found[column] for column in view.columns)]
    if not possible:
        raise UnusableSample("no_caption")
    view = _by_weight(possible, rng)
    first, *others = view.columns
    parts = _first_column(captions, view, found[first], rng)
    for column in others:
        texts, wanted = [text for _, text in found[column]], int(rng.integers(1, view.max_texts + 1))
        parts += texts if len(texts) == 1 else [texts[i] for i in rng.permutation(len(texts))[:wanted]]
    template = view.templates[int(rng.integers(len(view.templates)))] if len(view.templates) > 1 else view.templates[0]
    caption = clean(template.replace("{}", view.separator.join(parts)), max_chars=config.max_chars, form=config.form)
    return augment_text(caption, config.augment, rng)


def _usable(captions: Captions, column: str, config: CaptionConfig) -> list[tuple[int, str]]:
    """The cleaned texts of a column that are long enough, each with its place in the column."""
    texts = enumerate(_cleaned(captions, column, config))
    return [(place, text) for place, text in texts if len(text) >= config.min_chars]


def _by_weight(views: Sequence[CaptionView], rng: np.random.Generator) -> CaptionView:
    point = rng.random() * sum(view.weight for view in views)
    for view in views:
        if point < view.weight:
            return view
        point -= view.weight
    return views[-1]


def _first_column(
    captions: Captions, view: CaptionView, found: list[tuple[int, str]], rng: np.random.Generator
) -> list[str]:
    texts = [text for _, text in found]
    if len(texts) <= 1 or view.pick == "all":
        return texts
    match view.pick:
        case "first":
            return texts[:1]
        case "random":
            return [texts[int(rng.permutation(len(texts))[0])]]
        case "weighted":
            return [texts[_by_score(captions, view, [place for place, _ in found], rng)]]


def _by_score(captions: Captions, view: CaptionView, places: list[int], rng: np.random.Generator) -> int:
    scores = captions.numbers(view.scores or "")
    if len(scores) != len(captions.texts(view.columns[0])):
        raise UnusableSample("bad_caption", f"{len(scores)} numbers in {view.scores!r} for another number of texts")
    weights = scores[places]
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
        raise UnusableSample("bad_caption", f"{view.scores!r} does not weigh the texts")
    return int(np.searchsorted(weights.cumsum(), rng.random() * weights.sum(), side="right").clip(max=len(weights) - 1))


def choose_hard(captions: Captions, config: CaptionConfig, rng: np.random.Generator) -> tuple[str, ...]:
    """The hard captions of a step; none where none are configured.

    Raises:
        UnusableSample: `no_hard_caption`, the column has no text.
    """
    if config.hard is None:
        return ()
    texts = [text for text in _cleaned(captions, config.hard.column, config) if text]
    if not texts:
        raise UnusableSample("no_hard_caption")
    return _some(texts, config.hard.count, rng)


def choose_positive(
    captions: Captions, caption: str, config: CaptionConfig, rng: np.random.Generator
) -> tuple[str, ...]:
    """The further right captions of a step; none where none are configured."""
    if config.positive is None:
        return ()
    texts = [text for column in config.positive.columns for _, text in _usable(captions, column, config)]
    return _some(texts or [caption], config.positive.count, rng)


def _some(texts: Sequence[str], count: int, rng: np.random.Generator) -> tuple[str, ...]:
    chosen = rng.permutation(len(texts))[:count] if len(texts) >= count else rng.integers(len(texts), size=count)
    return tuple(texts[i] for i in chosen)


def _cleaned(captions: Captions, column: str, config: CaptionConfig) -> list[str]:
    return [clean(text, max_chars=config.max_chars, form=config.form) for text in captions.texts(column)]
