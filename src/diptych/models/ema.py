"""An averaged copy of the weights: smoother than the last step, often better."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from diptych.distributed.sharding import is_compressed, own

M = TypeVar("M", bound=nn.Module)

_DECAY_WARMUP = 10.0


class Ema(Generic[M]):
    """Exponential moving average of a model's parameters and buffers, in their own precision.

        a ← d·a + (1 − d)·w,   d = min(decay, (1 + n) / (10 + n)) after n updates

    The ramp of d lets the average forget the random start.
    """

    def __init__(self, model: M, *, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        # Compressed weights never change, and torchao would round those of four bits once more.
        shared = {id(weight): weight for weight in model.parameters() if is_compressed(weight)}
        self.model: M = copy.deepcopy(model, shared).eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average one optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (_DECAY_WARMUP + self.num_updates))
        # Of divided models each rank averages its slices; what does not learn is as it was.
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        learned = [
            (average, weight) for average, weight in pairs if weight.requires_grad
        ]  # the others are as they were
        averages: list[Tensor] = [own(average) for average, _ in learned]
        weights: list[Tensor] = [own(weight) for _, weight in learned]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
