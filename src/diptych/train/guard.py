"""What makes a run leave out an update, go back, or stop: gradients that are no numbers, spikes, signals."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diptych.config import Config

_DECAY = 0.99
_WARMUP = 100


@dataclass(frozen=True)
class GuardConfig(Config):
    """Which updates are left out, and when that is too much."""

    spike_factor: float | None = None
    """Updates are left out whose gradient norm is more than this many times its running average; none: only those that
    are infinite or no number."""
    max_skipped: int = 10
    """Updates left out in a row before the run has failed; looked at every `log.every_steps`."""
    on_failure: Literal["stop", "roll_back"] = "stop"
    """What a failed run does: stop, or go back to its newest checkpoint and on with the samples that follow now."""
    max_roll_backs: int = 3
    """Times that a run goes back before it stops after all."""

    def __post_init__(self) -> None:
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ValueError(f"spike_factor must be above 1, not {self.spike_factor}")
        if self.max_skipped < 1 or self.max_roll_backs < 0:
            raise ValueError("max_skipped must be at least 1, max_roll_backs not negative")


class Guard:
    """Judges updates by their gradient norm, on the device: reading the verdict would make every step wait for it."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self._config = config
        self._average = torch.zeros((), device=device)
        """Running average of the norms of updates that were made."""
        self._made = torch.zeros((), device=device)
        self._skipped = torch.zeros((), device=device)
        self._streak = torch.zeros((), device=device)
        self.roll_backs = 0

    @torch.no_grad()
    def judge(self, grad_norm: Float[Tensor, ""]) -> Bool[Tensor, ""]:
        """Whether the update is to be left out. The same on every rank, as the norm is."""
        bad = ~grad_norm.isfinite()
        if self._config.spike_factor is not None:
            bad |= (self._made >= _WARMUP) & (grad_norm > self._config.spike_factor * self._average)
        # While there are few, the plain mean; behind that, an exponential average.
        weight = torch.clamp(1 / (self._made + 1), min=1 - _DECAY)
        self._average = torch.where(bad, self._average, torch.lerp(self._average, grad_norm, weight))
        self._made += ~bad
        self._skipped += bad
        self._streak = torch.where(bad, self._streak + 1, torch.zeros_like(self._streak))
        return bad

    def skipped(self) -> int:
        """Updates left out since the beginning. Waits for the device."""
        return int(self._skipped)

    @property
    def failed(self) -> bool:
        """Whether too many in a row were left out. Waits for the device."""
        return int(self._streak) >= self._config.max_skipped

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        values = [self._average, self._made, self._skipped, self._streak]
        return {"values": torch.stack(values).tolist(), "roll_backs": self.roll_backs}

    def take(self, tree: dict[str, Any]) -> None:
        """The reverse of `to_json`."""
        values = torch.tensor(tree["values"], device=self._average.device)
        self._average, self._made, self._skipped, self._streak = values.unbind()
        self.roll_backs = tree["roll_backs"]

    def went_back(self, before: "Guard") -> None:
        """Notes that the run begins again from the checkpoint that this guard is of; what was counted stays counted."""
        self.roll_backs = before.roll_backs + 1
        self._skipped, self._streak = before._skipped, torch.zeros_like(self._streak)


class StopRequest:
    """Whether a signal has asked this process to end."""

    def __init__(self) -> None:
        self.name = ""
        """Of the signal; empty as long as none came."""

    def note(self, number: int, _: object) -> None:
        """A signal handler."""
        self.name = signal.Signals(number).name


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Within, SIGTERM and SIGUSR1 (what slurm sends before it takes a node away) are requests, not ends."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there alone
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
