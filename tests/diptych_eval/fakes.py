"""An encoder whose answers are known, and sets it knows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import diptych.testing as make
from diptych.testing import hash_text, tiny_sample


class ColourEncoder:
    """Knows the colour that `tiny_sample` draws from a key, and the caption `caption of KEY`."""

    image_size, logit_scale = 16, 10.0

    def __init__(self, fingerprint: str = "a") -> None:
        self.fingerprint = fingerprint
        self.num_images = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.num_images += len(images)
        return F.normalize(images[:, :, 0, 0].float() - 127.5, dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        drawn = [np.random.default_rng(hash_text(text.split()[-1])) for text in texts]
        colours = np.stack([rng.integers(0, 256, 3, dtype=np.uint8) for rng in drawn])
        return F.normalize(torch.from_numpy(colours).float() - 127.5, dim=-1)


def benchmark(root: Path, count: int = 12, *, labels: bool = True) -> Path:
    samples = [tiny_sample(f"k{i}", label=i if labels else None) for i in range(count)]
    make.write_shard(root / "test" / "0.tar", samples)
    (root / "classnames.txt").write_text("".join(f"k{i}\n" for i in range(count)))
    (root / "zeroshot_classification_templates.txt").write_text("{c}\na photo of {c}\n")
    return root
