"""The optimizer factory."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from diptych.config import Config
from diptych.optim.groups import split
from diptych.optim.schedules import ScheduleConfig


@dataclass(frozen=True)
class OptimConfig(Config):
    """AdamW (arXiv:1711.05101) with the parameter groups of `diptych.optim.groups`."""

    peak_lr: float = 1e-3
    """Learning rate after warm-up."""
    beta1: float = 0.9
    """Decay of the gradient average."""
    beta2: float = 0.98
    """Decay of the squared gradient average; CLIP uses 0.98 (arXiv:2103.00020, table 18)."""
    eps: float = 1e-6
    """Added to the root of the squared average; CLIP uses 1e-6."""
    weight_decay: float = 0.2
    """Decoupled decay of matrices."""
    grad_clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; none: no clipping."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate moves over samples seen."""

    def __post_init__(self) -> None:
        if self.peak_lr <= 0:
            raise ValueError(f"peak_lr must be positive, but is {self.peak_lr}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError("beta1 and beta2 must lie in [0, 1)")


def build(config: OptimConfig, *modules: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over the trainable parameters of all modules."""
    groups = [
        {
            "params": [parameter for _, parameter in group.parameters],
            "weight_decay": config.weight_decay if group.decays else 0.0,
        }
        for group in split(*modules)
    ]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of every group for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def step_unless(optimizer: torch.optim.Optimizer, left_out: Bool[Tensor, ""]) -> None:
    """One update; where `left_out` is true nothing changes, which the device finds out by itself."""
    optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]  # as torch's GradScaler tells fused optimizers
    optimizer.step()
