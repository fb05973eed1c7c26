"""Made-up data for the benchmark of the loader: pictures that cost a decoder what photographs cost, and captions."""

import io
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from diptych.data import index
from diptych.errors import ConfigError
from diptych.testing import TinySample, write_shard

_DISTINCT = 64
_QUALITY = 90
_LARGEST = 5000


def photo(width: int, height: int, *, seed: int) -> Image.Image:
    """Noise in octaves, mostly of brightness, with edges and places of texture: about 0.2 bytes a pixel as JPEG."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128, np.float32)
    for octave in range(2, 9):
        cells = (max(2, 2**octave * height // max(width, height)), max(2, 2**octave * width // max(width, height)))
        colour = rng.normal(size=(*cells, 3)).astype(np.float32)
        noise = 0.3 * colour + 1.2 * colour.mean(2, keepdims=True)
        total += 60 / 1.9 ** (octave - 2) * _enlarged(noise, width, height)
    for _ in range(25):
        left, top = rng.integers(0, width), rng.integers(0, height)
        right, bottom = left + rng.integers(1, max(width // 3, 2)), top + rng.integers(1, max(height // 3, 2))
        total[top:bottom, left:right] += 25 * rng.normal(size=3)
    where = np.abs(_enlarged(rng.normal(size=(8, 8, 1)).astype(np.float32), width, height))
    total += 4 * where * rng.normal(size=(height, width, 1))
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def _enlarged(noise: np.ndarray, width: int, height: int) -> np.ndarray:
    channels = [Image.fromarray(noise[:, :, i]) for i in range(noise.shape[2])]
    return np.stack([np.asarray(c.resize((width, height), Image.Resampling.BICUBIC)) for c in channels], 2)


def caption(number: int) -> str:
    """Eight to fifteen words of ImageNet's class names, which tokenizers divide as they divide real captions; no two
    numbers give the same."""
    rng = np.random.default_rng(number)
    return f"{' '.join(rng.choice(_words(), rng.integers(8, 16)))} {number}"


@cache
def _words() -> tuple[str, ...]:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple(sorted({word.lower() for name in IMAGENET_CLASSNAMES for word in name.split()}))


def write_captions(path: Path, count: int) -> None:
    """One caption a line."""
    path.write_text("\n".join(map(caption, range(count))), encoding="utf-8")


def write_photos(folder: Path, size: tuple[int, int], samples: int, *, shards: int) -> float:
    """Indexed shards of `samples` JPEG pictures of width x height; of those, 64 differ. Returns bytes per pixel."""
    width, height = size
    pictures = [_jpeg(photo(width, height, seed=seed)) for seed in range(min(_DISTINCT, samples))]
    for shard in range(shards):
        numbers = range(shard, samples, shards)
        members = (_sample(number, pictures[number % len(pictures)]) for number in numbers)
        write_shard(folder / f"{shard:06d}.tar", list(members))
    return float(np.mean([len(picture) for picture in pictures])) / (width * height)


def write_many(folder: Path, shards: int, samples_per_shard: int) -> None:
    """Very many indexed shards, each of tiny pictures: names of one file, so that they take no room."""
    picture = _jpeg(photo(32, 32, seed=0))
    first = folder / "000000.tar"
    write_shard(first, [_sample(number, picture) for number in range(samples_per_shard)])
    for number in range(1, shards):
        shard = folder / f"{number:06d}.tar"
        os.link(first, shard)
        os.link(index.sidecar(first), index.sidecar(shard))


def pattern(folder: Path, shards: int) -> str:
    """The brace pattern of what was written."""
    return f"{folder}/{{000000..{shards - 1:06d}}}.tar" if shards > 1 else f"{folder}/000000.tar"


def _sample(number: int, picture: bytes) -> TinySample:
    return TinySample(f"s{number:08d}", {"jpg": picture, "txt": caption(number).encode()})


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`500x375,1024x768` as (width, height) pairs.

    Raises:
        ConfigError: it is something else, or too small or large.
    """
    matches = [re.fullmatch(r"(\d{2,4})x(\d{2,4})", part) for part in text.split(",")]
    sizes = [(int(match[1]), int(match[2])) for match in matches if match]
    if len(sizes) < len(matches) or not all(16 <= side <= _LARGEST for size in sizes for side in size):
        raise ConfigError(f"{text!r} are no sizes of pictures · bench data --sizes · write them as 500x375,1024x768")
    return sizes
