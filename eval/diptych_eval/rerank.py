"""A short list by features, ranked again by a model that sees picture and text together.

Source: arXiv:2107.07651 (ALBEF), section 4.2: the nearest k by features, in the order of the matching head; behind them
all others, as they were.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych_eval.embedder import EmbeddedSet, Embedder
from diptych_eval.metrics import Right
from diptych_eval.neighbours import nearest


def ranks_again(
    embedder: Embedder, found: EmbeddedSet, texts: tuple[str, ...], right: Right, k: int
) -> tuple[Int[Tensor, " N"], Int[Tensor, " M"]]:
    """Ranks of the matching head among the nearest k and what ties for the last place; 0 where nothing right is among
    them. Every rank must call.

    Raises:
        DataError: the model has no matching head.
    """
    features = embedder.texts(texts)
    images, their_texts = _pairs(found.features, features, k)
    captions, their_images = _pairs(features, found.features, k)
    rows, places = torch.cat([images, their_images]), torch.cat([their_texts, captions])
    logits = embedder.matches(found, texts, rows, places)
    sets = [frozenset(some) for some in right]
    is_right = torch.tensor([place in sets[row] for row, place in zip(rows.tolist(), places.tolist(), strict=True)])
    of_images, of_texts = slice(None, len(images)), slice(len(images), None)
    return (
        ranks_within(images, logits[of_images], is_right[of_images], len(found)),
        ranks_within(captions, logits[of_texts], is_right[of_texts], len(texts)),
    )


def _pairs(
    anchors: Float[Tensor, "N D"], candidates: Float[Tensor, "M D"], k: int
) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    blocks = list(nearest(anchors, candidates, min(k, len(candidates))))
    return torch.cat([block.anchors for block in blocks]), torch.cat([block.candidates for block in blocks])


def ranks_within(
    anchors: Int[Tensor, " P"], logits: Float[Tensor, " P"], right: Bool[Tensor, " P"], count: int
) -> Int[Tensor, " N"]:
    """Rank of the best right candidate of each of `count` anchors among its wrong ones, ties against it; 0: it has no
    right one."""
    best = torch.full((count,), -torch.inf).scatter_reduce(0, anchors[right], logits[right], "amax")
    ahead = ~(logits < best[anchors]) & ~right  # so written, NaN counts against the model too
    ranks = torch.ones(count, dtype=torch.long).index_add(0, anchors, ahead.long())
    return torch.where(torch.bincount(anchors[right], minlength=count) > 0, ranks, 0)
