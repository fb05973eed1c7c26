"""What a run asks of an optimizer, whoever keeps its state."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Judge = Callable[[Float[Tensor, ""]], Bool[Tensor, ""]]
"""Norm of a gradient → whether its update is to be left out. Asked once for each."""


class Update(NamedTuple):
    """What became of a gradient; on the device."""

    grad_norm: Float[Tensor, ""]
    """Of the whole gradient, before clipping; the same on every rank."""
    left_out: Bool[Tensor, ""]


def clip(gradients: list[Tensor], norm: Float[Tensor, ""], max_norm: float | None) -> None:
    """Scales gradients in place so that the norm of the whole, of which they are a part, is at most `max_norm`."""
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


class Optimizer(Protocol):
    """What a run keeps of an optimizer; torch's are such. Each group has `names`, of its parameters, and `rate`.
    Updates are made by `diptych.optim.optimizers.update`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        ...
