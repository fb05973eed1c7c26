"""What ways to choose words ask of a captioner: `CaptionWriter` is CoCa's, `PrefixWriter` a language model's."""

from typing import NamedTuple, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from diptych.errors import ConfigError


class Step(NamedTuple):
    """What is known of the next word of each caption."""

    hidden: Float[Tensor, "N W"]
    logits: Float[Tensor, "N V"]
    early_logits: Float[Tensor, "N V"] | None
    """Those of a layer below the last, where one was asked for."""


class Writer(Protocol):
    """Captions of some pictures in the making; at first one of each, without a word."""

    num_captions: int

    def start(self) -> Step:
        """Before all else: what is known of the first word of each caption."""
        ...

    def step(self, ids: Int[Tensor, " N"]) -> Step:
        """Adds a word to each caption; what is known of the one behind it."""
        ...

    def select(self, rows: Int[Tensor, " M"]) -> None:
        """Goes on with other captions: row numbers of as many for each picture, side by side, in the pictures'
        order."""
        ...


def check_early_layer(number: int | None, depth: int) -> None:
    """Raises ConfigError unless `number`, from 1, is that of a layer below the last of `depth`."""
    if number is not None and number >= depth:
        raise ConfigError(
            f"layer_contrast is {number}, the decoder has {depth} layers · generate · choose one below the last"
        )
