"""Whether an export gives the features that the model gives: written, opened again by its library, compared."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from diptych.errors import CheckpointError
from diptych.models.dual_encoder import DualEncoder

TOLERANCE = 1e-4
"""Largest difference of a number of unit-norm features: other kernels for the same sums stay a hundred times below."""
_PICTURES = 4
CAPTIONS = (
    "a photo of a red fox",
    "",
    "Two dogs & 3 cats, it's raining!",
    "“rock’n’roll”:  naïve   café — 12.5 km\n",
    "一只红狐狸 на траве 🦊",
    "one very long caption that goes on and on, " * 40,
)


@dataclass(frozen=True)
class Difference:
    """How far the features of an export are from the model's: the largest difference of a number, of unit vectors."""

    image: float
    text: float


@dataclass(frozen=True)
class Peer:
    """The exported model as its own library opens it."""

    encode_image: Callable[[UInt8[Tensor, "B 3 height width"]], Float[Tensor, "B D"]]
    """Features, of any length, of pixels of the model's size."""
    encode_text: Callable[[Sequence[str]], Float[Tensor, "B D"]]
    """Features, of any length, of captions."""


@torch.no_grad()
def compare(model: DualEncoder, peer: Peer) -> Difference:
    """The differences on random pictures and a few captions, one of them too long, one empty.

    Raises:
        CheckpointError: they are more than rounding.
    """
    size, device = model.image_size, model.logit_scale.device
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_PICTURES, 3, size, size), dtype=torch.uint8, generator=generator)
    with as_used(model):
        ours = model.encode_image(images.to(device)), model.encode_text(model.tokenizer(CAPTIONS).to(device))
    theirs = peer.encode_image(images), peer.encode_text(CAPTIONS)
    image, text = (_largest(a, b) for a, b in zip(ours, theirs, strict=True))
    if not (image <= TOLERANCE and text <= TOLERANCE):  # no number is no agreement either
        raise CheckpointError(
            f"the export gives other features, off by {image:.1e} (pictures) and {text:.1e} (captions) · "
            f"limit {TOLERANCE:.0e} · nothing is written"
        )
    return Difference(image, text)


def _largest(ours: Float[Tensor, "B D"], theirs: Float[Tensor, "B D"]) -> float:
    return float((ours.cpu() - F.normalize(theirs.detach().cpu().float(), dim=-1)).abs().max())


@contextmanager
def as_used(model: DualEncoder) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
