"""Wrong pairs that look right: for every picture a caption, and for every caption a picture, of others of the batch.

Captions travel, pictures do not: a pair is made where its picture is. Source: arXiv:2107.07651, section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.distributed.collectives import all_gather_rows
from diptych.distributed.groups import Group
from diptych.models.matching import WrongPairs

_NUMBERS = 1 << 22
"""Of pairs whose similarities are there at once."""


@dataclass(frozen=True)
class Partners:
    """Places in the group; -1 where all others have the same caption."""

    text_of_image: Int[Tensor, " B"]
    """For this rank's pictures."""
    image_of_text: Int[Tensor, " B"]
    """For this rank's texts."""


@torch.no_grad()
def draw(
    image_features: Float[Tensor, "B D"],
    text_features: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""],
    caption_ids: Int[Tensor, " B"],
    group: Group,
    *,
    seed: int,
) -> Partners:
    """One wrong partner for each, drawn with the softmax of its logits among those with other captions. Every rank of
    the group must call, with as many rows and the same seed."""
    count = len(caption_ids)
    # Samples are dealt to ranks in turn: in their own order the draw is the same on any number of ranks.
    order = torch.arange(group.size * count, device=caption_ids.device).view(group.size, count).T.flatten()
    images, texts, ids = (all_gather_rows(part, group)[order] for part in (image_features, text_features, caption_ids))
    points = torch.rand(2, count, group.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    of_images, of_texts = points[:, :, group.rank].to(ids.device)
    text_of_image = _drawn(logit_scale * image_features, texts, caption_ids, ids, of_images)
    image_of_text = _drawn(logit_scale * text_features, images, caption_ids, ids, of_texts)
    return Partners(*(torch.where(found >= 0, order[found], -1) for found in (text_of_image, image_of_text)))


def _drawn(anchors: Tensor, candidates: Tensor, own_ids: Tensor, ids: Tensor, points: Tensor) -> Int[Tensor, " B"]:
    """Where the running sum of an anchor's probabilities passes its point in [0, 1)."""
    size = max(_NUMBERS // len(ids), 1)
    found = []
    for rows, own, point in zip(anchors.split(size), own_ids.split(size), points.split(size), strict=True):
        allowed = own[:, None] != ids
        logits = (rows @ candidates.T).double().masked_fill(~allowed, -torch.inf)
        sums = (logits - logits.amax(1, keepdim=True)).exp().nan_to_num(0).cumsum(1)
        place = torch.searchsorted(sums, point[:, None] * sums[:, -1:], right=True).clamp(max=len(ids) - 1)
        found.append(torch.where(allowed.gather(1, place), place, -1)[:, 0])
    return torch.cat(found)


def wrong_pairs(partners: Partners, tokens: Int[Tensor, "B L"], group: Group) -> WrongPairs:
    """The pairs whose pictures are this rank's, in the order of the pictures. Every rank of the group must call."""
    first, count = group.rank * len(tokens), len(tokens)
    lengths = all_gather_rows(tokens.new_tensor([tokens.shape[1]]), group)
    everyone = all_gather_rows(F.pad(tokens, (0, int(lengths.max()) - tokens.shape[1])), group)
    image_of_text = all_gather_rows(partners.image_of_text, group)
    theirs = ((image_of_text >= first) & (image_of_text < first + count)).nonzero()[:, 0]
    own = (partners.text_of_image >= 0).nonzero()[:, 0]
    images = torch.cat([own, image_of_text[theirs] - first])
    texts = torch.cat([partners.text_of_image[own], theirs])
    order = images.argsort(stable=True)
    return WrongPairs(images[order], everyone[texts[order]])


def divided(pairs: WrongPairs, sizes: Sequence[int]) -> list[WrongPairs]:
    """Those of consecutive pieces of the batch, each numbered from the beginning of its piece."""
    ends = torch.tensor(sizes, device=pairs.images.device).cumsum(0)
    counts = torch.searchsorted(pairs.images, ends).diff(prepend=ends.new_zeros(1)).tolist()
    starts = [0, *ends.tolist()]
    return [
        WrongPairs(images - start, tokens)
        for images, tokens, start in zip(pairs.images.split(counts), pairs.tokens.split(counts), starts, strict=False)
    ]
