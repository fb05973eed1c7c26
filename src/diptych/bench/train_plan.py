"""What `diptych bench train` is asked: who trains what, how often, beside whom."""

import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from diptych.distributed.runtime import Precision
from diptych.errors import ConfigError

OURS, SAVING, PEER = "ours", "ours-saving", "open_clip"
IMPLEMENTATIONS = (OURS, SAVING, "bare", "open_clip-step", PEER)
TRACE = "trace.json"
"""What a profiled run leaves in its folder."""
SKIPPED_STEPS = 3
"""Of a profiled run, at its beginning."""


@dataclass(frozen=True)
class Plan:
    """One call of the benchmark; each field is an option of the same name."""

    device: Literal["cpu", "cuda"]
    every: int
    """Steps between logged lines, at which the loop waits for the device; a rate is that of so many steps."""
    model: str = "ViT-B-32"
    """As `model.towers.name`."""
    batch: int = 64
    steps: int = 30
    """That count."""
    warmup: int = 5
    """Steps before those."""
    rounds: int = 3
    workers: int = 2
    precision: Precision = "auto"
    against: tuple[str, ...] = ("bare", "open_clip-step")
    peer_python: Path | None = None
    """Of open_clip's environment."""
    patch_dropout: float | None = None
    compile: bool = False
    checkpoint_activations: bool = False
    picture: tuple[int, int] = (500, 375)
    """Width and height of the JPEG files."""
    split_steps: int = 8
    """Of the profiled run; 0: none."""
    profile: Path | None = None
    """Where its trace goes."""
    work: Path | None = None
    """Folder for shards and checkpoints, some gigabytes; none: the system's."""
    settings: tuple[str, ...] = ()
    """`key=value` settings of our recipe."""

    def __post_init__(self) -> None:
        if min(self.batch, self.steps, self.every, self.rounds) < 1 or min(self.warmup, self.workers) < 0:
            raise ConfigError("batch, steps, every and rounds must be at least 1 · bench train · give positive numbers")
        if self.steps % self.every or self.warmup % self.every:
            raise ConfigError(
                f"steps ({self.steps}) and warmup ({self.warmup}) are no multiples of every ({self.every}) · bench "
                "train · change one of them"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device · bench train --device · use cpu")
        self._check_names()
        self._check_peer()
        self._check_split()

    def _check_names(self) -> None:
        unknown = [name for name in self.against if name not in IMPLEMENTATIONS]
        if unknown:
            use = ", ".join(IMPLEMENTATIONS[1:])
            raise ConfigError(f"unknown implementation {unknown[0]!r} · bench train --against · use {use}")
        if SAVING in self.against and not self.warmup < self.saving_step < self.all_steps:
            raise ConfigError(
                f"{self.steps} steps behind {self.warmup} are too few to save among them · bench train --steps · give "
                "more"
            )

    def _check_peer(self) -> None:
        if PEER in self.against and self.peer_python is None:
            raise ConfigError(
                "open_clip's trainer runs in an environment of its own · bench train --peer-python · make it as "
                "benchmarks/README.md says, or leave open_clip out of --against"
            )
        if self.peer_python is not None and not os.access(self.peer_python, os.X_OK):
            raise ConfigError(
                f"there is no Python at {str(self.peer_python)!r} · bench train --peer-python · "
                "make the peer's environment as benchmarks/README.md says"
            )

    def _check_split(self) -> None:
        least = SKIPPED_STEPS + 2
        if self.split_steps < least and (self.split_steps or self.profile):
            raise ConfigError(
                f"a profiled run needs at least {least} steps, not {self.split_steps} · bench train --split-steps · "
                "give more"
            )
        if self.profile is not None and not self.profile.absolute().parent.is_dir():
            raise ConfigError(f"there is no folder for {str(self.profile)!r} · bench train --profile · name another")

    @property
    def all_steps(self) -> int:
        """Those before the timed ones too."""
        return self.warmup + self.steps

    @property
    def saving_step(self) -> int:
        """The one step behind which `ours-saving` makes a checkpoint: the first logged one behind the middle."""
        return (self.all_steps // 2 // self.every + 1) * self.every

    @property
    def names(self) -> tuple[str, ...]:
        """The implementations, ours first."""
        return tuple(dict.fromkeys((OURS, *self.against)))

    def command(self) -> str:
        """What makes the same plan: `diptych bench train` with every option that is not as usual or depends on the
        machine."""
        words = ["diptych", "bench", "train"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "settings" or value == field.default:
                continue
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if value is True else [_word(field.name, value)]
        return shlex.join([*words, *self.settings])


def _word(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return ("x" if name == "picture" else ",").join(map(str, value))
    return str(value)
