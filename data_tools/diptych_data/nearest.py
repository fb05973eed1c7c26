"""Nearest neighbours among unit vectors, block by block: no matrix of all pairs is ever stored."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 4096


def neighbours(
    features: Float[Tensor, "N D"], k: int, *, block: int = _BLOCK
) -> Iterator[tuple[int, Int[Tensor, "rows k"]]]:
    """For each block of rows: where it begins, and the places of the k rows of largest cosine, itself left out.

    Memory: O(block² + block · k). Among equal cosines any may be taken.
    """
    count = len(features)
    if not 1 <= k < count:
        raise ValueError(f"k must lie in [1, {count - 1}], not {k}")
    for start in range(0, count, block):
        rows = features[start : start + block]
        best = torch.full((len(rows), 0), 0.0)
        places = torch.empty(len(rows), 0, dtype=torch.long)
        for first in range(0, count, block):
            cosines = rows @ features[first : first + block].T
            if first == start:
                cosines.fill_diagonal_(-torch.inf)
            found, where = cosines.topk(min(k, cosines.shape[1]), dim=1)
            best, places = torch.cat([best, found], 1), torch.cat([places, where + first], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            places = places.gather(1, order)
        yield start, places


def credibility(
    images: Float[Tensor, "N D"], texts: Float[Tensor, "N D"], k: int, *, block: int = _BLOCK
) -> Float[Tensor, " N"]:
    """How much the neighbours of each pair agree that its picture and caption belong together, in [0, 1].

        from_image_i = mean over the k nearest neighbours j of image i of cos(text_j, text_i)
        from_text_i  = mean over the k nearest neighbours j of text i  of cos(image_j, image_i)
        credibility_i = (1 + (from_image_i + from_text_i) / 2) / 2

    A picture whose lookalikes have captions that speak of something else is suspected of a wrong caption.
    Rows are unit vectors.
    """
    agreed = _agreement(images, texts, k, block) + _agreement(texts, images, k, block)
    return ((1 + agreed / 2) / 2).clamp(0, 1)


def _agreement(near: Tensor, judged: Tensor, k: int, block: int) -> Tensor:
    """Mean cosine in `judged` between each row and its neighbours in `near`."""
    parts = []
    for start, places in neighbours(near, k, block=block):
        own = judged[start : start + len(places)]
        total = torch.zeros(len(places))
        for column in places.T:  # one neighbour at a time: [rows, k, D] would be k times the block
            total += (judged[column] * own).sum(1)
        parts.append(total / k)
    return torch.cat(parts)


def close_pairs(
    features: Float[Tensor, "N D"], min_cosine: float, *, block: int = _BLOCK
) -> Iterator[tuple[Int[Tensor, " M"], Int[Tensor, " M"], Float[Tensor, " M"]]]:
    """All pairs i < j of unit rows with a cosine of at least `min_cosine`, block by block: i, j, cosine."""
    for start in range(0, len(features), block):
        rows = features[start : start + block]
        for first in range(start, len(features), block):
            cosines = rows @ features[first : first + block].T
            if first == start:
                cosines = cosines.triu(1).masked_fill_(torch.ones_like(cosines, dtype=torch.bool).tril(), -torch.inf)
            i, j = (cosines >= min_cosine).nonzero(as_tuple=True)
            yield i + start, j + first, cosines[i, j]
