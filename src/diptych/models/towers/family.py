"""The family of tower sources. A member is one file here: a frozen dataclass of its YAML keys with a `build()`.

@dataclass(frozen=True)
class MyTowers(Towers, name="my_towers"):
    def build(self) -> BuiltTowers: ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from diptych.config import Choice


class TextTokenizer(Protocol):
    """Captions to token ids."""

    context_length: int

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids padded with 0 to `context_length`."""
        ...


class CachedTokenizer:
    """A tokenizer that remembers the captions it has seen: small data sets repeat theirs every epoch.

    Args:
        tokenizer: called with texts and `context_length`.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.context_length = context_length
        self._one = lru_cache(maxsize=65536)(lambda text: tokenizer([text], context_length=context_length)[0])

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids [B, context_length], padded with 0."""
        return torch.stack([self._one(text) for text in texts])


@dataclass(frozen=True)
class BuiltTowers:
    """An image tower and a text tower that meet in one space, and how their inputs are made."""

    image_tower: nn.Module
    """Normalised float images [B, 3, H, W] to features [B, D]."""
    text_tower: nn.Module
    """token ids [B, L] to features [B, D]."""
    tokenizer: TextTokenizer
    embed_dim: int
    image_size: int
    """Side in pixels."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    logit_scale: float | None
    """Stored (logarithmic) value that came with published weights; None for new towers."""
    logit_bias: float | None
    """Value that came with published weights; None for new towers, and for weights that have none."""
    open_clip_config: dict[str, Any] | None
    """`embed_dim`, `vision_cfg`, `text_cfg` from which open_clip builds the same towers: what an export to it needs.
    None for towers that open_clip does not know."""


def padded_with(tokens: Int[Tensor, "B L"], pad: int) -> Int[Tensor, "B L"]:
    """The ids that a model knows, of ids that travel one higher because 0 is padding there and a word here."""
    return torch.where(tokens != 0, tokens - 1, pad)


class Towers(Choice):
    """Where the two towers come from."""

    def build(self) -> BuiltTowers:
        """Makes the towers; draws random weights from torch's default generator."""
        raise NotImplementedError
