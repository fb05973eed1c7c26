"""Which words may come next, and how likely they are."""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.generate.cache import Step

_PLAUSIBLE = 0.1
"""Of the likeliest word's probability: below, a word does not gain by contrast (arXiv:2309.03883, α)."""


class Writer(Protocol):
    """Captions in the making, such as `CaptionWriter`."""

    num_captions: int

    def step(self, ids: Int[Tensor, " N"]) -> Step:
        """Adds a word to each caption; what is known of the one behind it."""
        ...

    def select(self, rows: Int[Tensor, " M"]) -> None:
        """Goes on with other captions, as many for each picture."""
        ...


@dataclass(frozen=True)
class Rules:
    """The frame of a caption: ids after `start`, the last of them `end` unless there is no room for it."""

    start: int
    end: int
    min_length: int
    max_length: int
    banned: tuple[int, ...] = ()
    """Ids that are no words, such as padding."""

    def first(self, writer: Writer, device: torch.device) -> Int[Tensor, " N"]:
        """What every caption begins with."""
        return torch.full((writer.num_captions,), self.start, device=device)

    def scores(self, step: Step, position: int) -> Float[Tensor, "N V"]:
        """Log-probabilities of the word at `position`, from 0; -inf for what must not stand there."""
        scores = step.logits.log_softmax(1)
        if step.early_logits is not None:
            scores = contrasted(scores, step.early_logits.log_softmax(1))
        barred = [*self.banned, *([self.end] if position < self.min_length else [])]
        return scores.index_fill(1, torch.tensor(barred, device=scores.device, dtype=torch.long), -torch.inf)


def contrasted(late: Float[Tensor, "N V"], early: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Log-probabilities by what the layers above an early one add, among words that are plausible to the last one.

        softmax_v (log p_v − log q_v) over all v with p_v ≥ 0.1·max p

    Source: arXiv:2309.03883, eqs. 2 and 3; p: last layer, q: early layer.
    """
    plausible = late >= late.amax(1, keepdim=True) + torch.tensor(_PLAUSIBLE).log()
    return (late - early).masked_fill(~plausible, -torch.inf).log_softmax(1)
