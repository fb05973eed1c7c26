"""Which pictures the report shows, and what is said beside them."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from diptych_eval.artifacts import Artifacts
from diptych_eval.report.plots import COLOURS, Points, scatter_map
from diptych_eval.tasks.family import Prediction


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
    """A row of the gallery: what was asked and the five best answers."""

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


def data_uri(picture: UInt8[Tensor, "3 side side"]) -> str:
    """The picture as a WebP data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_queries(found: Artifacts, count: int, *, seed: int = 0) -> list[Query]:
    """Pictures drawn at random (so neither flattering nor damning) with their best texts."""
    picked = _draw(len(found.image_predictions), count, seed)
    return [_image_query(found, found.image_predictions[i]) for i in picked]


def _image_query(found: Artifacts, prediction: Prediction) -> Query:
    right = set(found.right[prediction.anchor])
    guesses = tuple(Guess(found.texts[text], "", score, text in right) for text, score in prediction.ranked)
    truth = found.texts[found.right[prediction.anchor][0]]
    return Query(truth, data_uri(found.pictures[prediction.anchor]), prediction.rank, guesses)


def text_queries(found: Artifacts, count: int, *, seed: int = 0) -> list[Query]:
    """Texts drawn at random with their best pictures."""
    queries = []
    for i in _draw(len(found.text_predictions), count, seed):
        prediction = found.text_predictions[i]
        guesses = tuple(
            Guess("", data_uri(found.pictures[picture]), score, prediction.anchor in found.right[picture])
            for picture, score in prediction.ranked
        )
        queries.append(Query(found.texts[prediction.anchor], "", prediction.rank, guesses))
    return queries


def _draw(size: int, count: int, seed: int) -> list[int]:
    return sorted(np.random.default_rng(seed).permutation(size)[:count].tolist())


def worst_confusions(found: Sequence[Artifacts], count: int) -> list[Confusion]:
    """Wrong first guesses over several sets: the most frequent pairs first, among equals the most confident."""
    seen: Counter[tuple[str, str]] = Counter()
    scores: dict[tuple[str, str], list[float]] = {}
    pictures: dict[str, str] = {}
    examples: dict[tuple[str, str], tuple[Artifacts, int]] = {}
    owners: dict[str, tuple[Artifacts, int]] = {}
    for artifacts in found:
        for prediction in artifacts.image_predictions:
            text, score = prediction.ranked[0]
            truth, guess = artifacts.texts[artifacts.right[prediction.anchor][0]], artifacts.texts[text]
            owners.setdefault(truth, (artifacts, prediction.anchor))
            if truth != guess:
                seen[truth, guess] += 1
                scores.setdefault((truth, guess), []).append(score)
                examples.setdefault((truth, guess), (artifacts, prediction.anchor))
    ranked = sorted(seen, key=lambda pair: (-seen[pair], -float(np.mean(scores[pair]))))[:count]

    def picture(name: str, place: tuple[Artifacts, int] | None) -> str:
        if place is not None and name not in pictures:
            pictures[name] = data_uri(place[0].pictures[place[1]])
        return pictures.get(name, "")

    return [
        Confusion(
            truth,
            guess,
            seen[truth, guess],
            float(np.mean(scores[truth, guess])),
            picture(truth, examples[truth, guess]),
            picture(guess, owners.get(guess)),
        )
        for truth, guess in ranked
    ]


def embedding_map(found: Artifacts, *, max_points: int = 400) -> str:
    """Pictures and their texts on the two main axes of both together, coloured by group."""
    picked = _draw(len(found.image_predictions), max_points, 0)
    texts = [found.right[i][0] for i in picked]
    images, words = found.image_features[picked], found.text_features[texts]
    plane = _project(torch.cat([images, words]))
    image_xy, text_xy = plane[: len(picked)], plane[len(picked) :]
    groups = [found.groups[i] or "pictures" for i in picked]
    points = []
    for number, group in enumerate(sorted(set(groups))):
        rows = [row for row, name in enumerate(groups) if name == group]
        colour = COLOURS[number % len(COLOURS)]
        points += [Points(group, image_xy[rows], colour, "o"), Points("", text_xy[rows], colour, "x")]
    return scatter_map(f"{found.dataset}: pictures (dots) and their texts (crosses)", points)


def _project(features: Float[Tensor, "N D"]) -> np.ndarray:
    """Coordinates on the two directions of largest variance."""
    centred = features - features.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return (centred @ directions[:2].T).numpy()
