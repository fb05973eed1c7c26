"""The family of tower sources. A member is one file here: a frozen dataclass of its YAML keys with a `build()`.

@dataclass(frozen=True)
class MyTowers(Towers, name="my_towers"):
    def build(self) -> BuiltTowers: ...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from diptych.config import Choice
from diptych.models.captions import next_words


class TextTokenizer(Protocol):
    """Captions to token ids."""

    context_length: int

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids padded with 0 to `context_length`."""
        ...

    def word(self, row: int) -> str:
        """The token of a row of the tower's embeddings of words, as it is written."""
        ...


class CachedTokenizer:
    """A tokenizer that remembers the captions it has seen: small data sets repeat theirs every epoch.

    Args:
        tokenizer: called with texts and `context_length`.
        decode: from ids to text; none: words are written as their ids.
    """

    def __init__(
        self, tokenizer: Any, context_length: int, decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        self.context_length = context_length
        self._decode = decode
        self._one = lru_cache(maxsize=65536)(lambda text: tokenizer([text], context_length=context_length)[0])

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids [B, context_length], padded with 0."""
        return torch.stack([self._one(text) for text in texts])

    def word(self, row: int) -> str:
        """See TextTokenizer."""
        return self._decode([row]).strip() if self._decode is not None else f"token {row}"


@dataclass(frozen=True)
class Pixels:
    """How a model wants its pictures. Defaults are CLIP's, where nothing else is known."""

    size: int
    """Side of what the model sees, in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """By which values in [0, 1] are brought to about zero mean and, by `std`, unit variance."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    squash: bool = False
    """In evaluation: whether the whole picture is squeezed into the square, or its middle cut out."""
    before_crop: int | None = None
    """In evaluation: the side (the shorter one, unless squashed) that a picture is brought to before its middle is cut
    out; none: `size`."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True)
class BuiltTowers:
    """An image tower and a text tower that meet in one space, and how their inputs are made."""

    image_tower: nn.Module
    """Normalised float images [B, 3, H, W] to features [B, D]."""
    text_tower: nn.Module
    """token ids [B, L] to features [B, D]."""
    tokenizer: TextTokenizer
    embed_dim: int
    pixels: Pixels
    logit_scale: float | None
    """Stored (logarithmic) value that came with published weights; None for new towers."""
    logit_bias: float | None
    """Value that came with published weights; None for new towers, and for weights that have none."""
    open_clip_config: dict[str, Any] | None
    """`embed_dim`, `vision_cfg`, `text_cfg` from which open_clip builds the same towers: what an export to it needs.
    None for towers that open_clip does not know."""
    captioner: "Captioner | None" = None
    """Where there is one, the text tower gives (features [B, D], words [B, L, W]), and the image tower may give
    (features [B, D], tokens [B, P, W]); of one that does not, the features are the only token [B, 1, D]."""


@dataclass(frozen=True)
class Captioner:
    """What makes a captioner of two towers."""

    decoder: nn.Module
    """Tokens of pictures and words, to logits of what `targets` gives, or to their losses [B]. The last word of the
    longest caption is not handed to it: nothing follows."""
    spelling: "Spelling"
    width: int | None = None
    """Of what the decoder's `hidden` makes of picture and words, from which a head can judge; None: it has no such."""
    match_head: nn.Module | None = None
    """That head, where the weights bring one."""
    targets: Callable[[Int[Tensor, "B L"]], Int[Tensor, "B foretold"]] = next_words
    """From the token ids of captions to the right words that the decoder foretells, `IGNORED` where there is none."""


@dataclass(frozen=True)
class Spelling:
    """From ids to words, and the frame that captions are written in."""

    start: tuple[int, ...]
    """The ids that every caption begins with."""
    end: int
    """The id that stands behind every caption."""
    room: int
    """Ids that a caption can have, `end` among them and `start` not."""
    banned: tuple[int, ...]
    """Ids that are no words."""
    text: Callable[[Sequence[int]], str]
    """The words of ids, without start and end."""


def padded_with(tokens: Int[Tensor, "B L"], pad: int) -> Int[Tensor, "B L"]:
    """The ids that a model knows, of ids that travel one higher because 0 is padding there and a word here."""
    return torch.where(tokens != 0, tokens - 1, pad)


class Towers(Choice):
    """Where the two towers come from."""

    def build(self) -> BuiltTowers:
        """Makes the towers; draws random weights from torch's default generator."""
        raise NotImplementedError

    def reference(self) -> str | None:
        """The name by which `diptych.load` opens these very towers, weights included; None: there is none."""
        return None
