"""What a training step hands to an objective."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.distributed.collectives import all_gather, all_gather_rows
from diptych.distributed.groups import Group
from diptych.losses.pairs import Modality, Side, known_of
from diptych.losses.tiles import accumulation_dtype


@dataclass(frozen=True)
class Moment:
    """When a loss is computed: what schedules and random draws depend on, beside the batch."""

    step: int = 0
    samples_seen: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    """One rank's rows of a batch: as many on every rank of a group, and with the same things known."""

    image_features: Float[Tensor, "B D"]
    """Unit norm."""
    text_features: Float[Tensor, "B D"]
    """Unit norm; row i belongs to picture i."""
    logit_scale: Float[Tensor, ""]
    """Multiplies cosines: already exponentiated."""
    logit_bias: Float[Tensor, ""] | None = None
    """Added to logits (sigmoid loss)."""
    known: Mapping[str, Int[Tensor, "B ..."] | Float[Tensor, "B ..."]] = field(default_factory=dict)
    """What is known of each pair, whichever side asks: caption_ids, sample_ids, labels, label_features, …"""
    image_known: Mapping[str, Float[Tensor, "B ..."]] = field(default_factory=dict)
    """What is known of the pictures alone: teacher_features, …"""
    text_known: Mapping[str, Float[Tensor, "B ..."]] = field(default_factory=dict)
    """What is known of the texts alone."""
    hard_captions: Float[Tensor, "B K D"] | None = None
    """Unit-norm features of K wrong captions of each picture; `hard_ids`, which may be known, are their caption_ids."""
    positive_captions: Float[Tensor, "B P D"] | None = None
    """Unit-norm features of P further right captions of each picture."""
    caption_losses: Float[Tensor, " B"] | None = None
    """Of writing each caption, summed over its words."""
    caption_lengths: Int[Tensor, " B"] | None = None
    """How many words that were."""
    match_right: Float[Tensor, " B"] | None = None
    """The matching head's logits of the pairs, and"""
    match_wrong: Float[Tensor, " M"] | None = None
    """of pictures with captions of others."""
    class_logits: Float[Tensor, "B C"] | None = None
    """Of each picture and class."""
    prompt_losses: Float[Tensor, " B"] | None = None
    """What prompts of classes ask for beside the right class."""
    counter_images: Float[Tensor, "B D"] | None = None
    """Unit-norm features of a picture of a wrong caption of each picture, and"""
    counter_texts: Float[Tensor, "B D"] | None = None
    """of that caption. `counter_present`, which is known, says which rows have them; `counter_ids` are their
    caption_ids."""
    teacher_scale: float | None = None
    """Multiplies cosines of `teacher_features`; none: the teacher is an average of the model and shares its scale."""

    def check(self) -> None:
        """Raises ValueError unless the shapes agree."""
        image, text = self.image_features, self.text_features
        if image.ndim != 2 or image.shape != text.shape or not len(image):
            raise ValueError(
                f"image_features {list(image.shape)} and text_features {list(text.shape)} must both be [B, D] of one "
                "shape with at least one row · contrastive loss · give one text per picture"
            )
        if accumulation_dtype(image) != accumulation_dtype(text):
            raise ValueError(
                f"image_features are {image.dtype} and text_features {text.dtype} · contrastive loss · convert one"
            )
        for known in (self.known, self.image_known, self.text_known):
            for name, value in known.items():
                if value.shape[:1] != image.shape[:1]:
                    raise ValueError(
                        f"{name} {list(value.shape)} must have {len(image)} rows · contrastive loss · one for each pair"
                    )
        for name, some in (("hard_captions", self.hard_captions), ("positive_captions", self.positive_captions)):
            if some is not None and (some.ndim != 3 or (some.shape[0], some.shape[2]) != tuple(image.shape)):
                raise ValueError(
                    f"{name} {list(some.shape)} must be [B, K, D] of image_features {list(image.shape)} · "
                    "contrastive loss · K captions for each picture"
                )
        for name, scalar in (("logit_scale", self.logit_scale), ("logit_bias", self.logit_bias)):
            if scalar is not None and scalar.ndim:
                raise ValueError(f"{name} {list(scalar.shape)} must be a scalar · contrastive loss · squeeze it")

    def features(self, modality: Modality) -> Float[Tensor, "B D"]:
        """This rank's images or texts, as they are."""
        return self.image_features if modality == "image" else self.text_features

    def side(self, modality: Modality, needs: tuple[str, ...] = ()) -> Side:
        """This rank's images or texts as anchors. Raises ConfigError when one of the `needs` is not known."""
        features = self.features(modality)
        number = torch.arange(len(features), device=features.device)
        features = features.to(accumulation_dtype(features))
        return Side(modality, features, number, len(features), self.info(modality, needs))

    def info(self, modality: Modality, needs: tuple[str, ...]) -> dict[str, Tensor]:
        """What is known of the images or texts, by name. Raises ConfigError when one of the `needs` is not."""
        everything = {**self.known, **(self.image_known if modality == "image" else self.text_known)}
        dtype = accumulation_dtype(self.image_features)
        found = {name: known_of(modality, everything, name) for name in needs}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}

    @property
    def bias(self) -> Float[Tensor, ""]:
        """The logit bias; 0 where there is none."""
        return self.logit_bias if self.logit_bias is not None else self.logit_scale.new_zeros(())


def gathered(side: Side, group: Group) -> Side:
    """The anchors of all ranks of the group, features with gradient. Every rank of the group must call."""
    if group.size == 1:
        return side
    info = {
        name: all_gather(value, group) if value.requires_grad else all_gather_rows(value, group)
        for name, value in side.info.items()
    }
    features = all_gather(side.features, group)
    number = torch.arange(len(features), device=features.device)
    return Side(side.modality, features, number, len(features), info)


def numbered(side: Side, group: Group) -> Side:
    """This rank's anchors, numbered as in the whole group."""
    first = group.rank * len(side)
    return Side(side.modality, side.features, side.number + first, side.num_anchors, side.info)
