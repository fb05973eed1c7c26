"""Ways to trade compilation, time and memory for one another that change no number but by rounding."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diptych.config import Config
from diptych.distributed.sharding import blocks
from diptych.errors import ConfigError


@dataclass(frozen=True)
class SpeedConfig(Config):
    """What makes a step faster or smaller."""

    compile: bool = False
    """Compile the towers' layers (`torch.compile`), each kind once: captions of another length are compiled for once
    more, as of any length. Takes a minute at the start."""
    checkpoint_activations: bool = False
    """Keep the inputs of the towers' layers alone and compute the rest again in backward: less memory, a third more
    time."""
    text_multiple: int | None = None
    """The texts of a batch are padded to a length that is a multiple of this; none: of 8 on GPUs, whose matrix units
    like it, and of 1 on CPUs."""

    def __post_init__(self) -> None:
        if self.text_multiple is not None and self.text_multiple < 1:
            raise ValueError(f"text_multiple must be at least 1, not {self.text_multiple}")

    def chosen_text_multiple(self) -> int:
        """What it is on this machine."""
        return self.text_multiple or (8 if torch.cuda.is_available() else 1)


def prepare(model: nn.Module, config: SpeedConfig) -> None:
    """Changes a model's layers in place; their names stay. Before its parameters are divided.

    Raises:
        ConfigError: a tower has no layers whose activations could be computed again.
    """
    if config.checkpoint_activations:
        for name, tower in model.named_children():
            _checkpoint(name, tower)
    if config.compile:
        for block in blocks(model):
            block.compile()


def _checkpoint(name: str, tower: nn.Module) -> None:
    innermost = [layer for layer in blocks(tower) if not any(True for _ in blocks(layer))]
    if not innermost and name.endswith("_tower"):  # prompts and a decoder without layers of its own need none
        raise ConfigError(f"the {name} has no layers that repeat · speed.checkpoint_activations · leave it off")
    for layer in innermost:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
