"""What filter and dedup ask of a model; the command line hands one in."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from jaxtyping import Float, Int, UInt8
from PIL.Image import Image
from torch import Tensor

from diptych import log as logs
from diptych.data.faults import UnusableSample
from diptych.data.images import decode
from diptych.errors import DataError
from diptych_data import entries, pictures
from diptych_data.entries import Entry, Part

_BATCH = 256


class Encoder(Protocol):
    """A model behind two functions."""

    image_size: int
    """Side of the square pictures it takes, pixels."""

    def view(self, picture: Image) -> UInt8[Tensor, "3 size size"]:
        """What the model sees of a picture."""
        ...

    def encode_image(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B D"]:
        """Unit-norm float32 features."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Unit-norm float32 features."""
        ...


LoadModel = Callable[[str], Encoder]
"""From the name of a MODEL to the model."""


@dataclass(frozen=True)
class Features:
    """Features of the samples that could be used, in their order."""

    rows: Int[Tensor, " N"]
    """Their places among the samples that were asked for."""
    images: Float[Tensor, "N D"]
    texts: Float[Tensor, "N D"] | None
    faults: dict[int, str]
    """Place → why a sample could not be used."""


@dataclass(frozen=True)
class _Prepared:
    row: int
    picture: UInt8[Tensor, "3 side side"] | None
    text: str
    fault: str = ""


def embed(encoder: Encoder, parts: Sequence[Part], *, text_of: Callable[[Entry], str] | None) -> Features:
    """One pass over the parts: pictures in the evaluation view and, with `text_of`, one caption each.

    Raises:
        DataError: not one sample can be used.
    """

    def prepare(numbered: tuple[int, Entry]) -> _Prepared:
        row, entry = numbered
        try:
            picture = decode(pictures.picture_bytes(entry.members), at_least=encoder.image_size)
            text = text_of(entry) if text_of is not None else ""
            return _Prepared(row, encoder.view(picture), text)
        except UnusableSample as fault:
            return _Prepared(row, None, "", entry.fault or fault.reason)

    rows: list[int] = []
    faults: dict[int, str] = {}
    images: list[Tensor] = []
    texts: list[Tensor] = []
    everything = enumerate(entry for part in parts for entry in entries.read(part))
    # Threads: Pillow decodes without Python's lock, and pixels need not travel between processes.
    with logs.progress("embedding", sum(map(len, parts))) as bar, ThreadPoolExecutor() as pool:
        while batch := list(islice(everything, _BATCH)):
            prepared = list(pool.map(prepare, batch))
            faults |= {one.row: one.fault for one in prepared if one.fault}
            if views := [one.picture for one in prepared if one.picture is not None]:
                rows += [one.row for one in prepared if not one.fault]
                images.append(encoder.encode_image(torch.stack(views)))
                if text_of is not None:
                    texts.append(encoder.encode_text([one.text for one in prepared if not one.fault]))
            bar.advance(len(batch))
    if not rows:
        raise DataError(
            "no sample has a picture and a caption that can be used · run `diptych data check` on the shards"
        )
    return Features(torch.tensor(rows), torch.cat(images), torch.cat(texts) if texts else None, faults)
