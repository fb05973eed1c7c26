"""One pass over a set: pictures to features, kept with what the tasks and the report need of each sample."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diptych.data.evaluation import EvalSample, read_split
from diptych.errors import DataError
from diptych_eval.encoder import Encoder


@dataclass(frozen=True)
class EmbeddedSplit:
    """A set after its one pass."""

    features: Float[Tensor, "N D"]
    pictures: UInt8[Tensor, "N 3 side side"]
    """Small copies for the report."""
    keys: tuple[str, ...]
    captions: tuple[dict[str, tuple[str, ...]], ...]
    labels: tuple[int | None, ...]
    meta: tuple[dict[str, str], ...]

    def __len__(self) -> int:
        return len(self.keys)


def embed(encoder: Encoder, shards: str, *, batch_size: int = 256) -> EmbeddedSplit:
    """Encodes every usable sample once, in order.

    Raises:
        DataError: there are no shards, or nothing in them can be used.
    """
    features, pictures, samples = [], [], []
    for batch in _batches(read_split(shards, encoder.image_size), batch_size):
        images = torch.stack([sample.image for sample in batch])
        features.append(encoder.encode_image(images))
        pictures += [sample.thumbnail for sample in batch]
        samples += [(sample.key, sample.captions, sample.label, sample.meta) for sample in batch]
    if not samples:
        raise DataError(f"no usable sample · {shards} · check the shards")
    keys, captions, labels, meta = zip(*samples, strict=True)
    return EmbeddedSplit(torch.cat(features), torch.stack(pictures), keys, captions, labels, meta)


def _batches(samples: Iterator[EvalSample], size: int) -> Iterator[list[EvalSample]]:
    while batch := list(islice(samples, size)):
        yield batch
