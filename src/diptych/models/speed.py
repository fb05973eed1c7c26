"""Ways to trade compilation, time and memory for one another that change no number but by rounding."""

from dataclasses import dataclass
from typing import Any

from torch import nn

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


def prepare(model: nn.Module, config: SpeedConfig) -> None:
    """Changes a model's layers in place; their names stay. Before its parameters are divided.

    Raises:
        ConfigError: a tower does not know how to compute its activations again.
    """
    if config.checkpoint_activations:
        for name, tower in model.named_children():
            _checkpoint(name, tower)
    if config.compile:
        for block in blocks(model):
            block.compile()


def _checkpoint(name: str, tower: nn.Module) -> None:
    parts: list[Any] = [part for part in tower.modules() if callable(getattr(part, "set_grad_checkpointing", None))]
    theirs: list[Any] = [
        part for part in tower.modules() if callable(getattr(part, "gradient_checkpointing_enable", None))
    ]
    if parts:  # the outermost tells the others
        parts[0].set_grad_checkpointing(True)
    elif theirs:
        theirs[0].gradient_checkpointing_enable({"use_reentrant": False})
    else:
        raise ConfigError(f"the {name} cannot compute activations again · speed.checkpoint_activations · leave it off")
