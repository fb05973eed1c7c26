"""A made-up test set in clip-benchmark's layout, of ImageNet's and COCO's proportions, and the peer's view of any."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diptych.bench.data_pictures import photo
from diptych.errors import ConfigError
from diptych.testing import TinySample, write_shard

CLASS_FILE, TEMPLATE_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
_DISTINCT = 64
_QUALITY = 90
_SHARDS = 8
_WORDS = (6, 14)
"""Of a caption: at least, and fewer than; COCO's have about ten."""


@dataclass(frozen=True)
class MadeSet:
    """What is made."""

    pictures: int = 1000
    classes: int = 20
    """With 80 prompts each: as many for a picture as ImageNet's validation set has."""
    captions: int = 5
    """Of each picture, as COCO has."""
    size: tuple[int, int] = (500, 375)
    """Width and height, pixels."""


def write_set(folder: Path, made: MadeSet) -> None:
    """Writes shards whose samples have a class and captions, class names, and the prompts of arXiv:2103.00020. No two
    pictures are equal: among equals, who is first is for each implementation to say."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    everything = list(dict.fromkeys(IMAGENET_CLASSNAMES))
    words = sorted({word for name in everything for word in name.split() if word.isalpha()})
    photos = [np.asarray(photo(*made.size, seed=seed)) for seed in range(min(_DISTINCT, made.pictures))]
    shards = min(_SHARDS, made.pictures)
    for shard in range(shards):
        numbers = range(shard, made.pictures, shards)
        write_shard(folder / "test" / f"{shard}.tar", [_sample(number, made, photos, words) for number in numbers])
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n", encoding="utf-8")
    (folder / CLASS_FILE).write_text("\n".join(everything[: made.classes]) + "\n", encoding="utf-8")
    templates = [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
    (folder / TEMPLATE_FILE).write_text("\n".join(templates) + "\n", encoding="utf-8")


def _sample(number: int, made: MadeSet, photos: list[np.ndarray], words: list[str]) -> TinySample:
    rng = np.random.default_rng(number)
    shift = rng.integers(0, made.size, 2).tolist()
    picture = np.roll(photos[number % len(photos)], shift[::-1], axis=(0, 1))
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY)
    captions = "\n".join(" ".join(rng.choice(words, rng.integers(*_WORDS))) for _ in range(made.captions))
    label = str(number % made.classes)
    return TinySample(f"s{number:07d}", {"jpg": buffer.getvalue(), "cls": label.encode(), "txt": captions.encode()})


def peer_views(root: Path, folder: Path) -> tuple[Path, Path]:
    """clip-benchmark reads a folder as a set with classes or as one with captions: two folders with the same shards.

    Raises:
        ConfigError: `root` is no folder in its layout.
    """
    if not (root / "test" / "nshards.txt").is_file():
        raise ConfigError(
            f"no test/nshards.txt · {root} · write a set with `diptych data pack … layout=benchmark label=COLUMN`"
        )
    views = folder / "classes", folder / "captions"
    for view in views:
        view.mkdir(parents=True)
        (view / "test").symlink_to((root / "test").resolve(), target_is_directory=True)
    for name in (CLASS_FILE, TEMPLATE_FILE):
        (views[0] / name).write_bytes((root / name).read_bytes())
    (views[1] / "dataset_type.txt").write_text("retrieval\n", encoding="utf-8")
    return views
