"""Learning-rate schedules: pure functions of samples seen, so that a change of ranks or batch changes nothing."""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

from diptych.config import Config


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """How the learning rate moves."""

    shape: Literal["cosine", "constant", "inverse_sqrt", "cooldown"] = "cosine"
    """After warm-up: half a cosine to the end; flat; ∝ 1/√samples; flat with a linear descent over the last part."""
    warmup_samples: int = 0
    """Samples over which the rate rises linearly from 0."""
    final_fraction: float = 0.0
    """Rate at the end, as a fraction of the peak (cosine and cooldown)."""
    cooldown_fraction: float = 0.2
    """Share of all samples spent in the descent of `cooldown`, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.warmup_samples < 0:
            raise ValueError(f"warmup_samples must not be negative, but is {self.warmup_samples}")
        if not 0 <= self.final_fraction <= 1 or not 0 < self.cooldown_fraction <= 1:
            raise ValueError("final_fraction must lie in [0, 1] and cooldown_fraction in (0, 1]")


def factor(config: ScheduleConfig, samples_seen: int, total_samples: int) -> float:
    """What the peak rate is multiplied with after `samples_seen` of `total_samples`; in [0, 1]."""
    if samples_seen < config.warmup_samples:
        return samples_seen / config.warmup_samples
    progress = (samples_seen - config.warmup_samples) / max(total_samples - config.warmup_samples, 1)
    progress = min(progress, 1.0)
    low = config.final_fraction
    match config.shape:
        case "constant":
            return 1.0
        case "cosine":
            return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2
        case "inverse_sqrt":
            start = max(config.warmup_samples, 1)
            return math.sqrt(start / max(samples_seen, start))
        case "cooldown":
            left = min((1 - progress) / config.cooldown_fraction, 1.0)
            return low + (1 - low) * left
        case _:
            assert_never(config.shape)
