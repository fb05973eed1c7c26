"""Whether a caption belongs to a picture: one number of what a captioner's decoder makes of both."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.models.captions import last_places


class WrongPairs(NamedTuple):
    """Pictures of a forward pass with captions of others."""

    images: Int[Tensor, " M"]
    """Rows of the pictures."""
    tokens: Int[Tensor, "M L"]
    """Captions that are not theirs."""


class DecoderTexts(NamedTuple):
    """What a captioner's decoder is to look at beside the captions that are contrasted."""

    captions: Int[Tensor, "first L2"] | None = None
    """Other captions of the first pictures, for the losses of captions alone; None: those that are contrasted."""
    wrong: WrongPairs | None = None
    """For the matching head, beside the pairs; None: it is not asked."""


class MatchHead(nn.Module):
    """Reads the end of the text, which has seen all of its words and, through the decoder, the picture.

    Source: arXiv:2107.07651 (ALBEF), section 3.2: image-text matching; its two logits are one here, their difference.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, hidden: Float[Tensor, "B L W"], tokens: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Logits of belonging together, of what the decoder makes of each token."""
        rows = torch.arange(len(hidden), device=hidden.device)
        found: Tensor = self.linear(hidden[rows, last_places(tokens)])
        return found.squeeze(1).float()
