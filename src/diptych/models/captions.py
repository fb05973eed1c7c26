"""Captions as a captioner learns them."""

import torch
from jaxtyping import Int
from torch import Tensor

from diptych.vocabulary import IGNORED


def next_words(tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B L-1"]:
    """The right word behind each one but the last; `IGNORED` behind the end of a caption."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    # The last id that is no padding, not all zeros: id 0 stands within captions too ("!=" in CLIP's ids).
    last = torch.where(tokens != 0, places, 0).amax(1, keepdim=True)
    return torch.where(places[1:] <= last, tokens[:, 1:], IGNORED)
