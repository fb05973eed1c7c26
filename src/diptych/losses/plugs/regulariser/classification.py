"""The right class among all classes."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych.distributed.groups import Group
from diptych.errors import ConfigError
from diptych.losses.batch import Pairs
from diptych.losses.pairs import known_of
from diptych.losses.plugs.family import Regulariser


@dataclass(frozen=True)
class Classification(Regulariser, name="classification"):
    """Tells a picture's class among all classes, each as the model's prompts (`model.adapters`) read it.

        mean_i  CE(s·I_i·C, y_i) + λ·l_i          C [classes, D]: features of the classes, y: `labels`

    l: what the prompts ask for beside that (a router's gate, nearness to the templates), where they ask for anything.
    Source: arXiv:2109.01134, eq. 1-2, and the methods behind it; which one it is says the adapter.
    Cost: a forward and backward pass of the text tower over all classes, per step and rank.
    Use: pictures with labels, few of each class, in the place of the contrastive term (give that the weight 0).
    Verified: dense float64; 2 processes equal one, micro-batches equal the whole batch.
    """

    needs: ClassVar[tuple[str, ...]] = ("labels",)
    weight: float = 1.0
    """Factor of this term in the total."""
    label_smoothing: float = 0.0
    """Share of the target that goes to all classes alike, in [0, 1)."""
    prompt_weight: float = 1.0
    """λ: what the prompts ask for counts so many times."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """The mean over this rank's pictures.

        Raises:
            ConfigError: the model has no prompts of classes.
        """
        if pairs.class_logits is None:
            raise ConfigError(
                "the model has no prompts of classes · objective.regularisers: classification · add context or "
                "class_names to model.adapters"
            )
        labels = known_of("image", pairs.known, "labels")
        loss = F.cross_entropy(pairs.class_logits, labels, label_smoothing=self.label_smoothing)
        if pairs.prompt_losses is not None:
            loss = loss + self.prompt_weight * pairs.prompt_losses.mean()
        return loss
