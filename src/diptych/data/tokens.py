"""Token ids of a batch."""

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Int
from torch import Tensor


class Tokenizer(Protocol):
    """Captions to token ids; padding is 0 and stands at the end."""

    context_length: int

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids [B, context_length]."""
        ...


def trim(tokens: Int[Tensor, "B context"], multiple: int = 1) -> Int[Tensor, "B L"]:
    """Cuts the columns in which every row is padding; L is rounded up to a `multiple`, so that few shapes occur."""
    used = int((tokens != 0).any(0).nonzero().max()) + 1 if bool((tokens != 0).any()) else 1
    length = min(-(-used // multiple) * multiple, tokens.shape[1])
    return tokens[:, :length].contiguous()
