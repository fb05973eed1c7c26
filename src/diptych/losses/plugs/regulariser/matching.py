"""Which captions belong to which pictures, by a head that sees both together."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych.distributed.collectives import mean_over
from diptych.distributed.groups import Group, world_group
from diptych.errors import ConfigError
from diptych.losses.batch import Pairs
from diptych.losses.plugs.family import Regulariser


@dataclass(frozen=True)
class Matching(Regulariser, name="matching"):
    """Image-text matching: true pairs against hard ones of the batch, by the model's matching head m.

        mean over pairs of  log(1 + exp(−m(I_i, T_i))),  log(1 + exp(m(I_i, T_j))),  log(1 + exp(m(I_k, T_i)))

    For each picture i one caption j of the group is drawn with softmax_j(s·⟨I_i, T_j⟩) among those that differ from
    its own, for each caption one picture k likewise. The draw depends on seed, step and batch, not on how the batch
    falls on ranks and micro-batches.
    Source: arXiv:2107.07651 (ALBEF), section 3.2.
    Cost: both towers once more without gradient, to draw; the text tower and the decoder for two further pairs each.
    Use: `model.matching`, to tell pairs apart that features of one picture and of one text alone do not: the retrieval
    task's `rerank` asks the head about the best of them.
    Verified: dense float64; draws follow the softmax; 2 processes equal one, micro-batches equal the whole batch.
    """

    weight: float = 1.0
    """Factor of this term in the total."""

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """This rank's pairs over those of a rank on average, whatever `group` is. Every rank of the world calls.

        Raises:
            ConfigError: the head's logits are not there.
        """
        right, wrong = pairs.match_right, pairs.match_wrong
        if right is None or wrong is None:
            raise ConfigError(
                "the batch brings no matched pairs · objective.regularisers: matching · match_right, match_wrong"
            )
        count = mean_over(right.new_tensor(float(len(right) + len(wrong))), world_group())
        return (F.softplus(-right).sum() + F.softplus(wrong).sum()) / count
