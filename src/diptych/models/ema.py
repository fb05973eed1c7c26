"""An averaged copy of the weights: smoother than the last step, often better."""

import copy

import torch
from torch import nn

_DECAY_WARMUP = 10.0


class Ema:
    """Exponential moving average of a model's parameters and buffers, in their own precision.

        a ← d·a + (1 − d)·w,   d = min(decay, (1 + n) / (10 + n)) after n updates

    The ramp of d lets the average forget the random start.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average one optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (_DECAY_WARMUP + self.num_updates))
        averages, weights = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
