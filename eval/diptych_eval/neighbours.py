"""The k nearest candidates of each anchor, by cosine, in blocks.

Where the k-th place is tied, all that tie for the last places share them: with two places left for three equal
candidates each gets 2/3 of one. So the order of candidates never matters, and an anchor always has k places. Equal
means to the last bit of the product. A candidate whose score is NaN comes last.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ENTRIES = 2**24
"""Scores in memory at once."""


@dataclass(frozen=True)
class Neighbours:
    """Those of some consecutive anchors: P pairs, in no order."""

    anchors: Int[Tensor, " P"]
    candidates: Int[Tensor, " P"]
    scores: Float[Tensor, " P"]
    shares: Float[Tensor, " P"]
    """Of a place, in (0, 1]; an anchor's sum to k."""


def nearest(anchors: Float[Tensor, "N D"], candidates: Float[Tensor, "M D"], k: int) -> Iterator[Neighbours]:
    """Block by block.

    Args:
        k: at most the number of candidates.
    """
    size = max(1, _ENTRIES // len(candidates))
    for first in range(0, len(anchors), size):
        scores = (anchors[first : first + size] @ candidates.T).nan_to_num(nan=-torch.inf)
        last = scores.topk(k).values[:, -1:]
        above, tied = scores > last, scores == last
        left = k - above.sum(1).double()
        share = left / tied.sum(1)
        rows, columns = (above | tied).nonzero(as_tuple=True)
        shares = torch.where(tied[rows, columns], share[rows], 1.0)
        yield Neighbours(rows + first, columns, scores[rows, columns], shares)


def occurrences(anchors: Float[Tensor, "N D"], candidates: Float[Tensor, "M D"], k: int) -> Float[Tensor, " M"]:
    """How many anchors have each candidate among their k nearest; the mean is always k·N/M.

    Source: N_k of Radovanović et al., Hubs in space, JMLR 11 (2010).
    """
    counts = torch.zeros(len(candidates), dtype=torch.float64)
    for block in nearest(anchors, candidates, k):
        counts.index_add_(0, block.candidates, block.shares)
    return counts
