"""A classifier that sees texts alone: which of two captions is the true one? Cross-validated by caption."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.seeding import derive
from diptych_data.negatives.ngrams import DIM, Rows
from diptych_data.negatives.words import normal

FOLDS = 5
_STEPS = 80
_Z = 1.959964
"""Of a 95% interval."""


@dataclass(frozen=True)
class Accuracy:
    """How often the true caption is guessed; 0.5: the texts give nothing away."""

    value: float
    low: float
    high: float
    """95% interval (Wilson), by captions."""
    pairs: int
    captions: int

    @property
    def bias(self) -> float:
        """Distance from 0.5."""
        return abs(self.value - 0.5)


def folds(texts: Sequence[str], *, salt: str) -> Int[Tensor, " N"]:
    """The fold of each text, by what it says: capitals and marks aside."""
    return torch.tensor([derive(0, "fold", salt, normal(text)) % FOLDS for text in texts], dtype=torch.long)


def fit(rows: Rows, fold: Int[Tensor, " N"], other: Int[Tensor, " N"]) -> Float[Tensor, "DIM FOLDS"]:
    """For each fold the weights of a logistic regression on all pairs of which neither text lies in it.

    One caption's negative is often another's caption. Were it seen as a negative alone, the model would take the
    captions of its fold for false, and be wrong more often than chance.

    Minimises mean log(1 + exp(−w·d)) + |w|² / 2n over the n differences d, by Nesterov's method: the rows have unit
    length, so the gradient's Lipschitz constant is known and there is no rate to choose.
    """
    numbers = torch.arange(FOLDS)
    used = ((fold[:, None] != numbers) & (other[:, None] != numbers)).double()
    used /= used.sum(0).clamp(min=1)
    decay = 1.0 / max(rows.count, 1)
    rate = 1.0 / (0.25 + decay)
    weights = ahead = torch.zeros(DIM, FOLDS, dtype=torch.float64)
    for step in range(_STEPS):
        pull = torch.sigmoid(-rows.times(ahead)) * used
        new = ahead - rate * (decay * ahead - rows.transposed_times(pull))
        weights, ahead = new, new + (step / (step + 3)) * (new - weights)
    return weights


def gaps(rows: Rows, fold: Int[Tensor, " N"], weights: Float[Tensor, "DIM FOLDS"]) -> Float[Tensor, " N"]:
    """Score of the true text less that of the false one, by the model that has not seen the caption, false or true."""
    return rows.times(weights).gather(1, fold[:, None])[:, 0].round(decimals=9)


def accuracy(gap: Float[Tensor, " N"], captions: Sequence[str]) -> Accuracy:
    """Share of pairs with a gap above 0, ties counted as half; each caption has the same weight."""
    won = (gap > 0).double() + 0.5 * (gap == 0).double()
    numbers = {text: number for number, text in enumerate(dict.fromkeys(map(normal, captions)))}
    owner = torch.tensor([numbers[normal(text)] for text in captions], dtype=torch.long)
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, owner, won)
    value = float((sums / owner.bincount(minlength=len(numbers))).mean()) if numbers else 0.5
    return Accuracy(value, *wilson(value, len(numbers)), pairs=len(captions), captions=len(numbers))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` trials."""
    if not count:
        return 0.0, 1.0
    middle = (share + _Z * _Z / (2 * count)) / (1 + _Z * _Z / count)
    half = _Z / (1 + _Z * _Z / count) * math.sqrt(share * (1 - share) / count + _Z * _Z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
