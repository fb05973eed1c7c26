"""Captions written word by word."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from diptych.distributed.collectives import mean_over
from diptych.distributed.groups import Group, world_group
from diptych.errors import ConfigError
from diptych.losses.batch import Pairs
from diptych.losses.plugs.family import Regulariser
from diptych.vocabulary import TokenLoss


@dataclass(frozen=True)
class Caption(Regulariser, name="caption"):
    """How well a captioner foretells each word of a caption from the picture and the words before.

        mean over all words of the batch of   (1 − ε)·(lse_t − z_ty) + ε·mean_v (lse_t − z_tv) + ζ·lse_t²

    z_t: logits of word t, y: the right one, lse_t = log Σ_v exp z_tv; padding is no word, the end of the text is one.
    The mean is that of the whole batch, however its words fall on ranks and micro-batches.
    Source: arXiv:2205.01917 (weight 2 beside a contrastive weight of 1); arXiv:2204.02311, section 5 (ζ = 1e-4).
    Cost: the decoder and its vocabulary, forward and backward; logits of a few tokens at a time (`diptych.vocabulary`).
    Use: with towers that have a `multimodal` part, to write captions, and features that know more than names; with a
    language model that has `prefix_tokens`. Short captions for contrast and long ones for the next word (VladVA,
    arXiv:2412.04378): `view: second`, with the long ones' columns in `data.captions.second_views`.
    Verified: dense float64; 2 processes equal one, micro-batches equal the whole batch, padding changes nothing.
    """

    weight: float = 2.0
    """Factor of this term in the total."""
    label_smoothing: float = 0.0
    """ε: the share of a word's target that goes to all words alike, in [0, 1)."""
    z_loss: float = 0.0
    """ζ: keeps the logits' log-sum-exp near 0; 1e-4 where bf16 training becomes unstable."""
    view: Literal["first", "second"] = "first"
    """Whose words: those of the caption that is contrasted, or of a second one, from `data.captions.second_views`.
    CoCa's text tower then reads both, one after the other."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        if self.z_loss < 0:
            raise ValueError(f"z_loss must be at least 0, not {self.z_loss}")

    @property
    def form(self) -> TokenLoss:
        """How the model makes its losses."""
        return TokenLoss(self.label_smoothing, self.z_loss)

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """This rank's words over the words of a rank on average, whatever `group` is. Every rank of the world calls.

        Raises:
            ConfigError: the losses of the captions are not there.
        """
        if pairs.caption_losses is None or pairs.caption_lengths is None:
            raise ConfigError(
                "the model writes no captions · objective.regularisers: caption · give it caption_losses and "
                "caption_lengths"
            )
        words = mean_over(pairs.caption_lengths.sum().to(pairs.caption_losses.dtype), world_group())
        return pairs.caption_losses.sum() / words.clamp(min=1)
