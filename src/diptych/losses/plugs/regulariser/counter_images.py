"""A picture and a caption against a picture of a wrong caption and that caption."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.distributed.collectives import mean_over
from diptych.distributed.groups import Group, world_group
from diptych.errors import ConfigError
from diptych.losses.batch import Pairs
from diptych.losses.pairs import known_of
from diptych.losses.plugs.family import Regulariser


@dataclass(frozen=True)
class CounterImages(Regulariser, name="counter_images"):
    """Quadruplets (I, T, I⁻, T⁻): which of two captions belongs to each picture, which of two pictures to each caption.

        1/4 · mean over pictures with a counter-image of
            CE(I: T, T⁻) + CE(I⁻: T⁻, T) + CE(T: I, I⁻) + CE(T⁻: I⁻, I)
        CE(a: b, c) = log(1 + exp(s·⟨a, c⟩ − s·⟨a, b⟩))

    The mean is that of the whole batch, however they fall on ranks and micro-batches.
    Source: arXiv:2311.03964, of it a picture's own rows and columns; `hard_captions` puts T⁻ before all pictures.
    Cost: both towers see as many counter-images as pictures.
    Use: `data.counter_images`, of pictures that were edited, generated, or found by their captions.
    Verified: dense float64; pictures without one change nothing; 2 processes equal one, micro-batches the whole batch.
    """

    needs: ClassVar[tuple[str, ...]] = ("counter_present",)
    weight: float = 1.0
    """Factor of this term in the total."""

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """This rank's quadruplets over those of a rank on average, whatever `group` is. Every rank of the world calls.

        Raises:
            ConfigError: the counter-images are not there.
        """
        if pairs.counter_images is None or pairs.counter_texts is None:
            raise ConfigError("the batch brings no counter-images · objective · set data.counter_images")
        present = known_of("image", pairs.known, "counter_present").to(pairs.counter_images.dtype)
        image, text = (pairs.side(side).features for side in ("image", "text"))
        counter_image, counter_text = pairs.counter_images.to(image.dtype), pairs.counter_texts.to(text.dtype)
        quadruplet = torch.stack(
            [
                _preferred(image, text, counter_text, pairs.logit_scale),
                _preferred(counter_image, counter_text, text, pairs.logit_scale),
                _preferred(text, image, counter_image, pairs.logit_scale),
                _preferred(counter_text, counter_image, image, pairs.logit_scale),
            ]
        ).mean(0)
        count = mean_over(present.sum(), world_group())
        return (quadruplet * present).sum() / torch.where(count > 0, count, 1)


def _preferred(anchor: Tensor, right: Tensor, wrong: Tensor, scale: Tensor) -> Float[Tensor, " B"]:
    return torch.nn.functional.softplus(scale * (anchor * (wrong - right)).sum(1))
