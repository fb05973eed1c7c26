"""A short list by features, ranked again by a model that sees picture and text together.

Source: arXiv:2107.07651 (ALBEF), section 4.2: the nearest k by features, in the order of the matching head; behind them
all others, as they were.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_eval.embedder import EmbeddedSet, Embedder
from diptych_eval.metrics import Right

_ROWS = 512


def ranks_again(
    embedder: Embedder, found: EmbeddedSet, texts: tuple[str, ...], right: Right, k: int
) -> tuple[Int[Tensor, " N"], Int[Tensor, " M"]]:
    """Ranks of the matching head among the nearest k; 0 where nothing right is among them. Every rank must call.

    Raises:
        DataError: the model has no matching head.
    """
    features = embedder.texts(texts)
    of_image, of_text = nearest(found.features, features, k), nearest(features, found.features, k)
    images = torch.cat([_numbers(of_image), of_text.flatten()])
    captions = torch.cat([of_image.flatten(), _numbers(of_text)])
    logits = embedder.matches(found, texts, images, captions)
    sets = [frozenset(places) for places in right]
    is_right = torch.tensor([place in sets[row] for row, place in zip(images.tolist(), captions.tolist(), strict=True)])
    split = of_image.numel()
    return (
        ranks_within(logits[:split].view_as(of_image), is_right[:split].view_as(of_image)),
        ranks_within(logits[split:].view_as(of_text), is_right[split:].view_as(of_text)),
    )


def nearest(anchors: Float[Tensor, "N D"], candidates: Float[Tensor, "M D"], k: int) -> Int[Tensor, "N K"]:
    """Places of the k most similar candidates of each anchor, or of all there are."""
    count = min(k, len(candidates))
    return torch.cat(
        [(rows.float() @ candidates.float().T).topk(count, dim=1).indices for rows in anchors.split(_ROWS)]
    )


def ranks_within(logits: Float[Tensor, "N K"], right: Tensor) -> Int[Tensor, " N"]:
    """Rank of the best right candidate of each row among the wrong ones, ties against it; 0: there is no right one."""
    best = logits.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ahead = (~(logits < best) & ~right).sum(1) + 1  # so written, NaN counts against the model too
    return torch.where(right.any(1), ahead, 0)


def _numbers(places: Int[Tensor, "N K"]) -> Int[Tensor, " N*K"]:
    return torch.arange(len(places)).repeat_interleave(places.shape[1])
