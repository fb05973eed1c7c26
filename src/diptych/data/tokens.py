"""Token ids of a batch."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor


class Tokenizer(Protocol):
    """Captions to token ids; padding is 0 and stands at the end."""

    context_length: int

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids [B, context_length]."""
        ...


def shorten(tokens: Int[Tensor, "B context"], length: int) -> Int[Tensor, "B L"]:
    """At most the first `length` ids of each row; a row that goes on behind them keeps its last id (the end-of-text
    token, where there is one) in the last place, as where a tokenizer itself cuts at this length."""
    if length >= tokens.shape[1]:
        return tokens
    # The last id that is no padding, not the number of them: id 0 stands within captions too ("!=" in CLIP's ids).
    last = ((tokens != 0) * torch.arange(tokens.shape[1])).amax(1)
    longer = last >= length
    short = tokens[:, :length].clone()
    short[longer, -1] = tokens[longer, last[longer]]
    return short


def trim(tokens: Int[Tensor, "B context"], multiple: int = 1) -> Int[Tensor, "B L"]:
    """Cuts the columns in which every row is padding; L is rounded up to a `multiple`, so that few shapes occur."""
    used = int((tokens != 0).any(0).nonzero().max()) + 1 if bool((tokens != 0).any()) else 1
    length = min(-(-used // multiple) * multiple, tokens.shape[1])
    return tokens[:, :length].contiguous()
