"""Pictures of the report: what models answered to the same questions, where they go wrong, where things lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from diptych_eval import exhibits
from diptych_eval.exhibits import Exhibit
from diptych_eval.folders import Evaluated
from diptych_eval.gallery import Confusion, Guess, Query
from diptych_eval.report import plots
from diptych_eval.report.plots import COLOURS
from diptych_eval.report.sections import Plot

_CONFUSIONS = 12
_MAPS = 2

Shown = dict[tuple[str, str], Exhibit]
"""Of one model, by task and set."""


@dataclass(frozen=True)
class Answer:
    """What one model said."""

    model: int
    rank: int
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Card:
    """One question and the answers to it."""

    text: str
    picture: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Gallery:
    """The cards of one set."""

    dataset: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Told:
    """What one model wrote."""

    model: int
    text: str
    score: float


@dataclass(frozen=True)
class CaptionCard:
    """One picture, what people wrote about it and what models did."""

    picture: str
    references: tuple[str, ...]
    answers: tuple[Told, ...]


@dataclass(frozen=True)
class CaptionGallery:
    """The cards of one set."""

    dataset: str
    cards: tuple[CaptionCard, ...]


@dataclass(frozen=True)
class Failures:
    """What one model confuses most."""

    model: int
    confusions: tuple[Confusion, ...]


@dataclass(frozen=True)
class Map:
    """Embedding maps of one set, and what their colours mean."""

    dataset: str
    plots: tuple[Plot, ...]
    groups: dict[str, str]
    """Group → colour."""


def shown_of(model: Evaluated) -> Shown:
    """The exhibits that an evaluation left behind."""
    found = ((one, exhibits.read(model.folder / "exhibits", one)) for one in model.results)
    return {(one.task, one.dataset): shown for one, shown in found if shown is not None}


def galleries(shown: Sequence[Shown], side: Literal["image_queries", "text_queries"]) -> list[Gallery]:
    """Of every set; a model answers a card where it was asked the same there."""
    found = []
    for task, dataset in dict.fromkeys(pair for some in shown for pair in some):
        asked = [getattr(some[task, dataset], side) if (task, dataset) in some else () for some in shown]
        longest = max(asked, key=len)
        cards = tuple(_card([some[place : place + 1] for some in asked], query) for place, query in enumerate(longest))
        if cards:
            found.append(Gallery(dataset, cards))
    return found


def _card(asked: Sequence[Sequence[Query]], query: Query) -> Card:
    answers = tuple(
        Answer(number, one.rank, one.guesses)
        for number, some in enumerate(asked)
        for one in some
        if one.text == query.text
    )
    return Card(query.text, query.picture, answers)


def caption_galleries(shown: Sequence[Shown]) -> list[CaptionGallery]:
    """Of every set; a model answers a card where it described the same picture there."""
    found = []
    for task, dataset in dict.fromkeys(pair for some in shown for pair in some):
        told = [some[task, dataset].descriptions if (task, dataset) in some else () for some in shown]
        longest = max(told, key=len)
        cards = tuple(
            CaptionCard(
                picture.picture,
                picture.references,
                tuple(
                    Told(number, one.written, one.score)
                    for number, some in enumerate(told)
                    for one in some
                    if (one.key, one.references) == (picture.key, picture.references)
                ),
            )
            for picture in longest
        )
        if cards:
            found.append(CaptionGallery(dataset, cards))
    return found


def failures(shown: Sequence[Shown]) -> list[Failures]:
    """Of all sets of a model, the most frequent confusions first; fewer of each where there are several models."""
    count = _CONFUSIONS if len(shown) == 1 else _CONFUSIONS // 2
    found = []
    for number, some in enumerate(shown):
        every = [one for (task, _), exhibit in some.items() if task == "zeroshot" for one in exhibit.confusions]
        every.sort(key=lambda one: (-one.count, -one.similarity))
        if every:
            found.append(Failures(number, tuple(every[:count])))
    return found


def maps(models: Sequence[Evaluated], shown: Sequence[Shown]) -> list[Map]:
    """Of the first sets with classes; each model's axes are its own."""
    pairs = dict.fromkeys(pair for some in shown for pair, one in some.items() if pair[0] == "zeroshot" and one.points)
    found = []
    for task, dataset in list(pairs)[: _MAPS if len(models) == 1 else 1]:
        of_model = {number: some[task, dataset].points for number, some in enumerate(shown) if (task, dataset) in some}
        groups = sorted({point.group for points in of_model.values() for point in points})
        colours = {group: COLOURS[number % len(COLOURS)] for number, group in enumerate(groups)}
        drawn = tuple(
            Plot(
                models[number].name if len(models) > 1 else "",
                Markup(plots.embedding_map(f"embedding map of {dataset}", points, colours)),
            )
            for number, points in of_model.items()
        )
        found.append(Map(dataset, drawn, {group: colour for group, colour in colours.items() if group}))
    return found
