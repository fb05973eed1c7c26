"""The optimizer factory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from diptych.config import Config
from diptych.distributed import sharding
from diptych.distributed.optimizer import Judge, Optimizer, Update, clip
from diptych.distributed.zero import ZeroOptimizer
from diptych.optim.groups import ParameterGroup, split
from diptych.optim.schedules import ScheduleConfig


@dataclass(frozen=True)
class OptimConfig(Config):
    """AdamW (arXiv:1711.05101) or Muon, with the parameter groups of `diptych.optim.groups`."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    """`muon`: matrices of the towers' layers by Muon (orthogonalised momentum, arXiv:2502.16982), the rest by AdamW;
    not with FSDP2, for it needs whole matrices."""
    peak_lr: float = 1e-3
    """Learning rate after warm-up. Muon's updates are scaled to the size of AdamW's, so it takes the same."""
    beta1: float = 0.9
    """Decay of the gradient average."""
    beta2: float = 0.98
    """Decay of the squared gradient average; CLIP uses 0.98 (arXiv:2103.00020, table 18)."""
    eps: float = 1e-6
    """Added to the root of the squared average; CLIP uses 1e-6."""
    weight_decay: float = 0.2
    """Decoupled decay of matrices."""
    momentum: float = 0.95
    """Of Muon."""
    rates: dict[str, float] = field(default_factory=dict)
    """Factors of the learning rate by the beginning of a parameter's name: `{text_tower: 0.1, logit_scale: 10}`."""
    layer_decay: float | None = None
    """Each layer of a tower learns at this share of the rate of the one above it; none: all at the same."""
    grad_clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; none: no clipping."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate moves over samples seen."""

    def __post_init__(self) -> None:
        if self.peak_lr <= 0:
            raise ValueError(f"peak_lr must be positive, but is {self.peak_lr}")
        if not all(0 <= value < 1 for value in (self.beta1, self.beta2, self.momentum)):
            raise ValueError("beta1, beta2 and momentum must lie in [0, 1)")
        if not all(0 <= rate < math.inf for rate in self.rates.values()):
            raise ValueError("rates must be numbers from 0 on")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], not {self.layer_decay}")


class Together:
    """Several optimizers as one; their parameters are numbered one after another."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts

    @property
    def parts(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers."""
        return self._parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all parts."""
        return [group for part in self._parts for group in part.param_groups]

    def step(self) -> None:
        """One update of each."""
        for part in self._parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of all parts."""
        for part in self._parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """States by number."""
        states: dict[int, Any] = {}
        first = 0
        for part in self._parts:
            states |= {first + number: state for number, state in part.state_dict()["state"].items()}
            first += _size(part)
        return {"state": states, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        first = 0
        for part in self._parts:
            own = {n - first: s for n, s in state_dict["state"].items() if first <= n < first + _size(part)}
            part.load_state_dict({"state": own, "param_groups": part.state_dict()["param_groups"]})
            first += _size(part)


def _size(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def build(config: OptimConfig, *modules: nn.Module) -> torch.optim.Optimizer | Together:
    """The optimizer of the trainable parameters of all modules.

    Raises:
        ConfigError: `rates` names no parameter.
    """
    groups = split(*modules, rates=config.rates, layer_decay=config.layer_decay)
    if config.algorithm == "adamw":
        return _adamw(config, groups)
    hidden = [_only(group, hidden=True) for group in groups if group.decays]
    others = [_only(group, hidden=False) if group.decays else group for group in groups]
    matrices = torch.optim.Muon(
        _torch_groups(config, [group for group in hidden if group.parameters]),
        lr=config.peak_lr,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together(matrices, _adamw(config, [group for group in others if group.parameters]))


def _adamw(config: OptimConfig, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(_torch_groups(config, groups), lr=config.peak_lr, betas=betas, eps=config.eps, fused=True)


def _torch_groups(config: OptimConfig, groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    return [
        {
            "params": [parameter for _, parameter in group.parameters],
            "names": [name for name, _ in group.parameters],
            "rate": group.rate,
            "weight_decay": config.weight_decay if group.decays else 0.0,
        }
        for group in groups
    ]


def _only(group: ParameterGroup, *, hidden: bool) -> ParameterGroup:
    """Of a group that decays, the matrices within layers, or everything else (projections, convolutions)."""
    chosen = [
        (name, parameter)
        for name, parameter in group.parameters
        if hidden == (parameter.ndim == 2 and any(part.isdecimal() for part in name.split(".")))
    ]
    return ParameterGroup(group.name, tuple(chosen), group.decays, group.rate)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """The rate of every group for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


def update(optimizer: Optimizer, modules: Sequence[nn.Module], max_norm: float | None, judge: Judge) -> Update:
    """Clips the gradients of all modules together, and makes one update unless `judge` says that it is to be left out.
    Every rank must call."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.update(max_norm, judge)
    assert isinstance(optimizer, torch.optim.Optimizer | Together)
    every = [parameter.grad for module in modules for parameter in module.parameters()]
    gradients = [gradient for gradient in every if gradient is not None]
    norm = sharding.total_norm(gradients)
    clip([sharding.own(gradient) for gradient in gradients], norm, max_norm)
    left_out = judge(norm)
    step_unless(optimizer, left_out)
    optimizer.zero_grad(set_to_none=True)
    return Update(norm, left_out)


def step_unless(optimizer: torch.optim.Optimizer | Together, left_out: Bool[Tensor, ""]) -> None:
    """One update; where `left_out` is true nothing changes. AdamW's device finds that out by itself."""
    parts = optimizer.parts if isinstance(optimizer, Together) else (optimizer,)
    for part in parts:
        if isinstance(part, torch.optim.AdamW):
            part.found_inf = left_out.float()  # type: ignore[attr-defined]  # as GradScaler tells fused optimizers
            part.step()
        elif not bool(left_out):
            part.step()
