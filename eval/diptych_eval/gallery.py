"""What the report shows of pictures and texts that were ranked against each other, and of captions that were written:
chosen while both are at hand.

Queries are drawn at random, so neither flattering nor damning; confusions are the most frequent ones.
"""

import base64
import io
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from diptych_eval.tasks.family import Descriptions, Matches

_GUESSES = 5
_POINTS = 400
_BLOCK = 1024


@dataclass(frozen=True)
class Guess:
    """One of the best candidates of a query."""

    text: str
    picture: str
    """Data URI, empty for text candidates."""
    score: float
    right: bool


@dataclass(frozen=True)
class Query:
    """What was asked and the five best answers."""

    text: str
    picture: str
    rank: int
    guesses: tuple[Guess, ...]


@dataclass(frozen=True)
class Confusion:
    """A class that is taken for another."""

    truth: str
    guess: str
    count: int
    similarity: float
    """Cosine of picture and wrong class, the mean over the confused pictures."""
    truth_picture: str
    guess_picture: str


@dataclass(frozen=True)
class Description:
    """A picture, what a model wrote about it and what people did."""

    key: str
    picture: str
    written: str
    references: tuple[str, ...]
    score: float
    """CIDEr-D."""


@dataclass(frozen=True)
class Point:
    """A picture and its text on the two main axes of both together."""

    group: str
    """The picture's `group` column, empty where it has none."""
    image: tuple[float, float]
    text: tuple[float, float]


def image_queries(found: Matches, count: int) -> tuple[Query, ...]:
    """Pictures with their best texts."""
    return tuple(_image_query(found, row) for row in _draw(len(found.pictures), count))


def _image_query(found: Matches, row: int) -> Query:
    right = found.right[row]
    best = _best(found.pictures.features[row], found.text_features)
    guesses = tuple(Guess(found.texts[text], "", score, text in right) for text, score in best)
    return Query(found.texts[right[0]], _picture(found, row), int(found.image_ranks[row]), guesses)


def text_queries(found: Matches, count: int) -> tuple[Query, ...]:
    """Texts with their best pictures; none where texts ask nothing."""
    ranks = found.text_ranks
    if ranks is None:
        return ()
    return tuple(_text_query(found, text, int(ranks[text])) for text in _draw(len(found.texts), count))


def _text_query(found: Matches, text: int, rank: int) -> Query:
    best = _best(found.text_features[text], found.pictures.features)
    guesses = tuple(Guess("", _picture(found, row), score, text in found.right[row]) for row, score in best)
    return Query(found.texts[text], "", rank, guesses)


def _best(anchor: Float[Tensor, " D"], candidates: Float[Tensor, "N D"]) -> list[tuple[int, float]]:
    best = (candidates @ anchor).topk(min(_GUESSES, len(candidates)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _draw(size: int, count: int) -> list[int]:
    return sorted(np.random.default_rng(0).permutation(size)[:count].tolist())


def _picture(found: Matches, row: int) -> str:
    return data_uri(found.pictures.thumbnail(row))


def data_uri(picture: UInt8[Tensor, "3 side side"]) -> str:
    """The picture as a WebP data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def descriptions(found: Descriptions, count: int) -> tuple[Description, ...]:
    """Pictures with their captions."""
    return tuple(
        Description(
            found.pictures.items[row].key,
            data_uri(found.pictures.thumbnail(row)),
            found.pictures.captions[row],
            found.references[row],
            float(found.scores[row]),
        )
        for row in _draw(len(found.pictures), count)
    )


def worst_confusions(found: Matches, count: int) -> tuple[Confusion, ...]:
    """Wrong first guesses: the most frequent pairs first, among equals the most confident."""
    seen: Counter[tuple[int, int]] = Counter()
    scores: dict[tuple[int, int], list[float]] = {}
    examples: dict[tuple[int, int], int] = {}
    of_class: dict[int, int] = {}
    for row, (guess, score) in enumerate(_first_guesses(found)):
        truth = found.right[row][0]
        of_class.setdefault(truth, row)
        if guess not in found.right[row]:
            seen[truth, guess] += 1
            scores.setdefault((truth, guess), []).append(score)
            examples.setdefault((truth, guess), row)
    ranked = sorted(seen, key=lambda pair: (-seen[pair], -float(np.mean(scores[pair]))))[:count]
    return tuple(
        Confusion(
            found.texts[truth],
            found.texts[guess],
            seen[truth, guess],
            float(np.mean(scores[truth, guess])),
            _picture(found, examples[truth, guess]),
            _picture(found, of_class[guess]) if guess in of_class else "",
        )
        for truth, guess in ranked
    )


def _first_guesses(found: Matches) -> list[tuple[int, float]]:
    guesses: list[tuple[int, float]] = []
    for rows in found.pictures.features.split(_BLOCK):
        best = (rows @ found.text_features.T).max(1)
        guesses += zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return guesses


def embedding_map(found: Matches) -> tuple[Point, ...]:
    """Some pictures and their texts on the two directions of largest variance."""
    picked = _draw(len(found.pictures), _POINTS)
    images = found.pictures.features[picked]
    texts = found.text_features[[found.right[row][0] for row in picked]]
    together = torch.cat([images, texts])
    centred = together - together.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = (centred @ directions[:2].T).tolist()
    half = len(picked)
    return tuple(
        Point(
            found.pictures.items[row].meta.get("group", ""),
            (plane[place][0], plane[place][1]),
            (plane[half + place][0], plane[half + place][1]),
        )
        for place, row in enumerate(picked)
    )
