"""Which words may come next, and how likely they are."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.generate.writer import Step

_PLAUSIBLE = 0.1
"""Of the likeliest word's probability: below, a word does not gain by contrast (arXiv:2309.03883, α)."""


@dataclass(frozen=True)
class Rules:
    """The frame of a caption: the last of its ids is `end` unless there is no room for it."""

    end: int
    min_length: int
    max_length: int
    banned: tuple[int, ...] = ()
    """Ids that are no words, such as padding."""

    def scores(self, step: Step, position: int) -> Float[Tensor, "N V"]:
        """Log-probabilities of the word at `position`, from 0; -inf for what must not stand there."""
        barred = [*self.banned, *([self.end] if position < self.min_length else [])]
        places = torch.tensor(barred, device=step.logits.device, dtype=torch.long)
        scores = step.logits.log_softmax(1).index_fill(1, places, -torch.inf)
        if step.early_logits is None:
            return scores
        # Barred before: words are plausible beside those that may stand there.
        return contrasted(scores, step.early_logits.log_softmax(1))


def contrasted(late: Float[Tensor, "N V"], early: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """Log-probabilities by what the layers above an early one add, among words that are plausible to the last one.

        softmax_v (log p_v − log q_v) over all v with p_v ≥ 0.1·max p

    Source: arXiv:2309.03883, eqs. 2 and 3; p: last layer, q: early layer.
    """
    plausible = late >= late.amax(1, keepdim=True) + torch.tensor(_PLAUSIBLE).log()
    return (late - early).masked_fill(~plausible, -torch.inf).log_softmax(1)
