"""Weighted terms → one number to descend and the named scalars to watch."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.config import Config
from diptych.distributed.runtime import Ranks
from diptych.losses.contrastive import direction_loss, positives, siglip_loss
from diptych.losses.gather import gather_features, gather_ids, own_rows


@dataclass(frozen=True)
class ContrastiveConfig(Config):
    """The contrastive term."""

    weight: float = 1.0
    """Factor of this term in the total."""
    normaliser: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` is CLIP's loss, `sigmoid` SigLIP's (give the model a logit_bias)."""
    targets: Literal["identity", "same_caption"] = "identity"
    """`identity`: the own caption alone is right; `same_caption`: equal captions in a batch are right for all."""
    label_smoothing: float = 0.0
    """Share of a softmax target spread evenly over all candidates, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        if self.normaliser == "sigmoid" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to the softmax normaliser; set it to 0 for sigmoid")


@dataclass(frozen=True)
class ObjectiveConfig(Config):
    """What is minimised."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Pulls pairs together and everything else in the batch apart."""


@dataclass(frozen=True)
class Pairs:
    """One rank's rows of a batch, as the objective sees them."""

    image_features: Float[Tensor, "B D"]
    text_features: Float[Tensor, "B D"]
    logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""] | None
    caption_ids: Int[Tensor, " B"]


@dataclass(frozen=True)
class Terms:
    """The value of an objective: on every rank the loss of its own rows, whose mean over ranks is the batch's."""

    total: Float[Tensor, ""]
    scalars: dict[str, Float[Tensor, ""]]


def evaluate(config: ObjectiveConfig, pairs: Pairs, ranks: Ranks) -> Terms:
    """All terms of the objective. Every rank must call."""
    contrastive = _contrastive(config.contrastive, pairs, ranks)
    total = config.contrastive.weight * contrastive
    return Terms(total, {"contrastive": contrastive.detach(), "total": total.detach()})


def _contrastive(config: ContrastiveConfig, pairs: Pairs, ranks: Ranks) -> Float[Tensor, ""]:
    rows = own_rows(pairs.image_features, rank=ranks.rank)
    all_text = gather_features(pairs.text_features)
    same_caption = config.targets == "same_caption"
    targets = positives(rows, pairs.caption_ids, gather_ids(pairs.caption_ids)) if same_caption else None
    if config.normaliser == "sigmoid":
        if targets is None:
            targets = torch.zeros(len(rows), len(all_text), dtype=torch.bool, device=rows.device)
            targets = targets.scatter(1, rows[:, None], value=True)
        bias = pairs.logit_bias if pairs.logit_bias is not None else 0.0
        return siglip_loss(pairs.image_features, all_text, pairs.logit_scale, bias, targets)
    all_image = gather_features(pairs.image_features)
    scale, smoothing = pairs.logit_scale, config.label_smoothing
    to_text = direction_loss(pairs.image_features, all_text, scale, rows, targets, smoothing)
    to_image = direction_loss(pairs.text_features, all_image, scale, rows, targets, smoothing)
    return (to_text + to_image) / 2
