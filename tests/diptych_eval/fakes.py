"""An encoder whose answers are known, and sets it knows."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import diptych.testing as make
from diptych.data.images import EvaluationView
from diptych.testing import TinySample, hash_text, tiny_sample


class ColourEncoder:
    """Knows the colour that `tiny_sample` draws from a key, and the caption `caption of KEY`."""

    view, logit_scale = EvaluationView(16), 10.0

    def __init__(self, fingerprint: str = "a") -> None:
        self.fingerprint = fingerprint
        self.num_images = 0

    def encode_image(self, images: Tensor) -> Tensor:
        self.num_images += len(images)
        return F.normalize(images[:, :, 0, 0].float() - 127.5, dim=-1)

    def read_classes(self, image_features: Tensor, names: Sequence[str]) -> None:
        return None

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


Colour = tuple[int, int, int]


def coloured(key: str, colour: Colour, **members: bytes) -> TinySample:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return TinySample(key, {"png": buffer.getvalue(), **members})


def two_parts(root: Path, **parts: Mapping[int, Sequence[Colour]]) -> Path:
    """Shards of colours by class, a folder of them for each part; keys are LABEL-NUMBER."""
    for part, classes in parts.items():
        samples = [
            coloured(f"{label}-{number}", colour, cls=str(label).encode())
            for label, colours in classes.items()
            for number, colour in enumerate(colours)
        ]
        make.write_shard(root / part / "0.tar", samples)
    return root


def reds_and_blues(root: Path, count: int = 5) -> Path:
    """Two classes that a line tells apart: label 3 is reddish, label 7 bluish."""
    rng = np.random.default_rng(0)

    def near(colour: Colour) -> list[Colour]:
        return [tuple(int(c) for c in np.clip(rng.normal(colour, 8), 0, 255)) for _ in range(count)]  # type: ignore[misc]

    return two_parts(root, **{part: {3: near((220, 60, 60)), 7: near((60, 60, 220))} for part in ("train", "test")})
