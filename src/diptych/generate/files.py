"""Captions of picture files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from diptych.data.faults import UnusableSample
from diptych.data.images import decode
from diptych.errors import DataError, one_line
from diptych.generate.settings import GenerateConfig
from diptych.generate.write import captions
from diptych.models.dual_encoder import DualEncoder

_BATCH = 32


def caption_files(
    model: DualEncoder, paths: Sequence[Path], config: GenerateConfig, *, view: Callable[[Image.Image], Tensor]
) -> Iterator[tuple[Path, str]]:
    """Each file and its caption, in order.

    Args:
        view: from a picture to the pixels that the model sees.

    Raises:
        DataError: a file is not there, or no picture.
        ConfigError: the model writes no captions.
    """
    device = model.logit_scale.device
    for first in range(0, len(paths), _BATCH):
        batch = paths[first : first + _BATCH]
        pixels: UInt8[Tensor, "B 3 height width"] = torch.stack([view(_picture(path)) for path in batch])
        yield from zip(batch, captions(model, pixels.to(device), config, first=first), strict=True)


def _picture(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"picture not readable ({one_line(error)}) · {path} · check the path") from error
    except UnusableSample as error:
        raise DataError(f"not a usable picture ({one_line(error)}) · {path} · leave it out") from error
