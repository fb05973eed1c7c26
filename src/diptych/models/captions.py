"""Captions as a captioner learns them."""

import torch
from jaxtyping import Int
from torch import Tensor

from diptych.vocabulary import IGNORED


def last_places(tokens: Int[Tensor, "B L"]) -> Int[Tensor, " B"]:
    """Where the last id stands that is no padding; not where zeros begin: id 0 stands within captions too ("!=" in
    CLIP's ids)."""
    return torch.where(tokens != 0, torch.arange(tokens.shape[1], device=tokens.device), 0).amax(1)


def next_words(tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B L-1"]:
    """The right word behind each one but the last; `IGNORED` behind the end of a caption."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(places[1:] <= last_places(tokens)[:, None], tokens[:, 1:], IGNORED)
