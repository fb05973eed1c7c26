"""What tells a negative from its caption without the picture: hashed n-grams of words and letters, as a difference."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from zlib import crc32

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_data.negatives.words import words_of

DIM = 1 << 14
"""Columns into which n-grams are hashed."""
_LETTERS = (3, 4)
_CONTEXT = 2
"""Words beside a change that stand in n-grams with it."""


@dataclass(frozen=True)
class Rows:
    """Sparse rows of unit length: one difference of features for each pair of texts."""

    row: Int[Tensor, " entries"]
    column: Int[Tensor, " entries"]
    value: Float[Tensor, " entries"]
    count: int

    def times(self, weights: Float[Tensor, "DIM models"]) -> Float[Tensor, "N models"]:
        """The rows' products with weights."""
        out = weights.new_zeros(self.count, weights.shape[1])
        return out.index_add_(0, self.row, weights[self.column] * self.value[:, None])

    def transposed_times(self, values: Float[Tensor, "N models"]) -> Float[Tensor, "DIM models"]:
        """The columns' products with values."""
        out = values.new_zeros(DIM, values.shape[1])
        return out.index_add_(0, self.column, values[self.row] * self.value[:, None])

    def taken(self, mask: Tensor) -> "Rows":
        """The rows that a mask names, numbered anew."""
        kept = mask[self.row]
        number = mask.cumsum(0) - 1
        return Rows(number[self.row[kept]], self.column[kept], self.value[kept], int(mask.sum()))


def differences(pairs: Sequence[tuple[str, str]]) -> Rows:
    """For each (true, false) pair the features of the true text less those of the false one."""
    rows, columns, values = [], [], []
    for number, (true, false) in enumerate(pairs):
        found = _difference(true, false)
        norm = sum(value * value for value in found.values()) ** 0.5
        for column, value in found.items():
            rows.append(number)
            columns.append(column)
            values.append(value / norm)
    return Rows(
        torch.tensor(rows, dtype=torch.long),
        torch.tensor(columns, dtype=torch.long),
        torch.tensor(values, dtype=torch.float64),
        len(pairs),
    )


def _difference(true: str, false: str) -> dict[int, float]:
    one, other = ("<", *words_of(true), ">"), ("<", *words_of(false), ">")
    first, last = _common(one, other)
    counts = Counter(_grams(one[first : len(one) - last]))
    counts.subtract(_grams(other[first : len(other) - last]))
    short, long = sorted((len(one), len(other)))
    counts.update({f"long {size}": 1 if len(one) == long else -1 for size in range(short, long)})
    found: dict[int, float] = {}
    for gram, count in counts.items():
        if count:
            code = crc32(gram.encode())
            column = code % DIM
            found[column] = found.get(column, 0.0) + (count if code >> 31 else -count)
    return {column: value for column, value in sorted(found.items()) if value}


def _common(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[int, int]:
    """Words in front and behind that both have, but for the two next to what differs: their n-grams cancel out."""
    most = min(len(one), len(other))
    first = next((place for place in range(most) if one[place] != other[place]), most)
    last = next((place for place in range(most - first) if one[-1 - place] != other[-1 - place]), most - first)
    return max(0, first - _CONTEXT), max(0, last - _CONTEXT)


def _grams(words: tuple[str, ...]) -> Iterator[str]:
    yield from words
    yield from map(" ".join, pairwise(words))
    yield from map(" ".join, zip(words, words[1:], words[2:], strict=False))
    for word in words:
        part = f"<{word}>"
        for size in _LETTERS:
            for start in range(len(part) - size + 1):
                yield f"letters {part[start : start + size]}"
