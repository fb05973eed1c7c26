"""What the report draws from, kept beside results.json so that it can be drawn again without the model.

artifacts/SLUG.json           task, dataset, keys, groups, texts, predictions
artifacts/SLUG.safetensors    image_features [N, D], text_features [M, D], pictures uint8 [N, 3, side, side]
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.runfolder import write_text
from diptych_eval.embed import EmbeddedSplit
from diptych_eval.tasks.family import Outcome, Prediction, Task


@dataclass(frozen=True)
class Artifacts:
    """One task's pictures, features and predictions."""

    task: str
    dataset: str
    groups: tuple[str, ...]
    """A coarse kind for each picture (its `group` column), empty where unknown."""
    texts: tuple[str, ...]
    right: tuple[tuple[int, ...], ...]
    """For each picture, its right texts."""
    image_predictions: tuple[Prediction, ...]
    text_predictions: tuple[Prediction, ...]
    image_features: Float[Tensor, "N D"]
    text_features: Float[Tensor, "M D"]
    pictures: UInt8[Tensor, "N 3 side side"]


def write(folder: Path, task: Task, split: EmbeddedSplit, outcome: Outcome) -> None:
    """Writes both files of one task."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{task.choice_name}-{re.sub(r'[^A-Za-z0-9_-]+', '-', task.dataset)}"
    tensors = {
        "image_features": split.features.to(torch.float16).contiguous(),
        "text_features": outcome.text_features.to(torch.float16).contiguous(),
        "pictures": split.pictures.contiguous(),
    }
    save_file(tensors, folder / f"{stem}.safetensors")
    document = {
        "task": task.choice_name,
        "dataset": task.dataset,
        "groups": [meta.get("group", "") for meta in split.meta],
        "texts": outcome.texts,
        "right": outcome.right,
        "image_predictions": [_pack(prediction) for prediction in outcome.image_predictions],
        "text_predictions": [_pack(prediction) for prediction in outcome.text_predictions],
    }
    write_text(folder / f"{stem}.json", json.dumps(document, ensure_ascii=False))


def _pack(prediction: Prediction) -> list[object]:
    return [prediction.anchor, prediction.rank, [[number, round(score, 5)] for number, score in prediction.ranked]]


def _unpack(row: list[object]) -> Prediction:
    anchor, rank, ranked = row
    pairs = tuple((int(number), float(score)) for number, score in ranked)  # type: ignore[attr-defined]
    return Prediction(int(anchor), pairs, int(rank))  # type: ignore[call-overload]


def read_all(folder: Path) -> list[Artifacts]:
    """Every task's artifacts, sorted by file name; none when there are none."""
    return [_read(path) for path in sorted(folder.glob("*.json")) if path.with_suffix(".safetensors").is_file()]


def _read(path: Path) -> Artifacts:
    document = json.loads(path.read_text(encoding="utf-8"))
    tensors = load_file(path.with_suffix(".safetensors"))
    return Artifacts(
        task=document["task"],
        dataset=document["dataset"],
        groups=tuple(document["groups"]),
        texts=tuple(document["texts"]),
        right=tuple(tuple(texts) for texts in document["right"]),
        image_predictions=tuple(_unpack(row) for row in document["image_predictions"]),
        text_predictions=tuple(_unpack(row) for row in document["text_predictions"]),
        image_features=tensors["image_features"].float(),
        text_features=tensors["text_features"].float(),
        pictures=tensors["pictures"],
    )
