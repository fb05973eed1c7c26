"""Contrastive losses over any batch, any grouping of ranks, with any plugs: useful without the rest of the package."""

from diptych.losses.accumulate import accumulate, gradient_sync
from diptych.losses.batch import Moment, Pairs
from diptych.losses.contrastive import ContrastiveLoss, contrastive_loss
from diptych.losses.objective import Objective, ObjectiveConfig, Terms
from diptych.losses.settings import ContrastiveConfig

__all__ = [
    "ContrastiveConfig",
    "ContrastiveLoss",
    "Moment",
    "Objective",
    "ObjectiveConfig",
    "Pairs",
    "Terms",
    "accumulate",
    "contrastive_loss",
    "gradient_sync",
]
