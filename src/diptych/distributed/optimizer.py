"""What a run asks of an optimizer, whoever keeps its state."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Bool, Float
from torch import Tensor

Judge = Callable[[Float[Tensor, ""]], Bool[Tensor, ""]]
"""Norm of a gradient → whether its update is to be left out. Asked once for each."""


class Update(NamedTuple):
    """What became of a gradient; on the device."""

    grad_norm: Float[Tensor, ""]
    """Of the whole gradient, before clipping; the same on every rank."""
    left_out: Bool[Tensor, ""]


class Optimizer(Protocol):
    """What the loop asks of an optimizer; torch's are such. Each group has `names`, of its parameters, and `rate`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's."""
        ...

    def step(self) -> Any:
        """One update."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        ...
