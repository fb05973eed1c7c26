"""The figures are clip-benchmark's: the same model and the same files give the same numbers, under its names.

clip-benchmark is run by a Python that has it: this one, or that of `.peer-eval` (benchmarks/README.md).
"""

import csv
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.bench.eval_data import peer_views
from diptych.config import from_tree
from diptych.data.images import evaluation_view, flatten
from diptych.encoder import load
from diptych.export import to_open_clip
from diptych.losses.contrastive import contrastive_loss
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TinySample, write_shard
from diptych_data.emoji import extract
from diptych_eval.clip_benchmark import rows
from diptych_eval.folders import open_folders
from diptych_eval.suite import EvalConfig, evaluate

ROOT = Path(__file__).parents[2]
SIDE = 48  # of the model; the pictures have 64 x 80, so that they are made smaller and cut
CLASSES, SHARDS, STEPS = 40, 3, 60
PROMPTS = ("{c}", "a picture of {c}.", "{c}, drawn in colours")
MODEL: dict[str, Any] = {
    "towers": {
        "type": "open_clip",
        "embed_dim": 32,
        "vision": {"layers": 2, "width": 64, "patch_size": 8, "image_size": SIDE, "head_width": 32},
        "text": {"context_length": 32, "width": 64, "heads": 2, "layers": 2, "vocab_size": 49408},
    }
}


@dataclass(frozen=True)
class Case:
    """A task that both measure: another one is a case here, its figures in PEER and its folder among the fixture's."""

    name: str
    task: dict[str, str]
    """Of ours; paths within the fixture's folder."""
    apart: tuple[str, str]
    """Two of its figures: chance is well below the first, that below the second, that below 1."""
    tolerance: float = 1e-4
    """One picture more or less is 1e-2 here, so that this is of the sums."""

    def tree(self, folder: Path) -> dict[str, Any]:
        """As in a configuration."""
        paths = {key: str(folder / value) for key, value in self.task.items() if key in ("root", "path")}
        return {"dataset": "emoji"} | self.task | paths


CASES = (
    Case("classes", {"type": "zeroshot", "root": "set"}, ("acc1", "acc5")),
    Case(
        "captions",
        {"type": "retrieval", "path": "set/test"},
        ("image_retrieval_recall@1", "text_retrieval_recall@10"),
    ),
    Case("labels", {"type": "zeroshot", "root": "labels"}, ("mean_average_precision", "mean_average_precision")),
)

# What the peer does for a model and a folder of each case, without its command line; in its own Python.
PEER = """
import json, runpy, sys
compat = runpy.run_path(sys.argv[1])
compat["install"]()
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models import load_clip

model, transform, tokenizer = load_clip("open_clip", "local-dir:" + sys.argv[2], None, None, "cpu")
model.eval()

def loader(root, task):
    dataset = build_dataset("wds/set", root=root, transform=transform, split="test", task=task)
    batches = torch.utils.data.DataLoader(dataset.batched(32), batch_size=None, num_workers=0)
    return batches, dataset

def classify(root):
    batches, dataset = loader(root, "zeroshot_classification")
    names, templates = dataset.classes, dataset.templates
    return zeroshot_classification.evaluate(model, batches, tokenizer, names, templates, device="cpu", amp=False)

def retrieve(root):
    batches, _ = loader(root, "zeroshot_retrieval")
    return zeroshot_retrieval.evaluate(model, batches, tokenizer, device="cpu", amp=False, recall_k_list=[1, 5, 10])

tasks = {"classes": classify, "captions": retrieve, "labels": classify}
found = {name: tasks[name](root) for name, root in json.loads(sys.argv[3]).items()}
sys.stdout.write("\\n" + json.dumps(found) + "\\n")
"""


@cache
def peer_python() -> str | None:
    """A Python that can import clip-benchmark."""
    for python in (sys.executable, ROOT / ".peer-eval" / "bin" / "python"):
        command = [str(python), "-I", "-c", "import importlib.util as u; assert u.find_spec('clip_benchmark')"]
        if Path(python).exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return str(python)
    return None


needs_peer = pytest.mark.skipif(
    peer_python() is None, reason="clip-benchmark is in neither this Python nor .peer-eval (benchmarks/README.md)"
)


# --- model and data ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`set` and `labels` in clip-benchmark's layout, and `model`, which has learned some of it."""
    folder = tmp_path_factory.mktemp("parity")
    pictures = _write_sets(folder)
    to_open_clip.export(_trained(pictures), folder / "model")
    return folder


def _write_sets(folder: Path) -> list[tuple[Image.Image, str]]:
    """Bundled pictures as JPEG and PNG, one to four of a class, two captions each; returns pictures and captions."""
    extract(folder / "emoji")
    by_name: dict[str, list[dict[str, str]]] = {}
    for table in ("train", "openmoji_seen", "fluent_seen"):
        with (folder / "emoji" / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                by_name.setdefault(row["name"], []).append(row)
    names = [name for name, drawn in by_name.items() if len(drawn) == 4][100::20][:CLASSES]
    samples: list[TinySample] = []
    seen: list[tuple[Image.Image, str]] = []
    for label, name in enumerate(names):
        for row in by_name[name][: 1 + label % 4]:
            picture = _opaque(folder / "emoji" / row["image"])
            captions = [f"{name} by {row['artist']}", f"{row['artist']} has drawn {name}"]
            samples.append(_sample(len(samples), picture, label, captions))
            seen += [(picture, caption) for caption in captions]
    for root in (folder / "set", folder / "labels"):
        _write_layout(root, samples, names)
    (folder / "labels" / "dataset_type.txt").write_text("multilabel\n", encoding="utf-8")
    return seen


def _write_layout(root: Path, samples: list[TinySample], names: list[str]) -> None:
    member = "npy" if root.name == "labels" else "cls"
    kept = [
        TinySample(
            sample.key, {name: data for name, data in sample.members.items() if name not in {"cls", "npy"} - {member}}
        )
        for sample in samples
    ]
    for shard in range(SHARDS):
        write_shard(root / "test" / f"{shard}.tar", kept[shard::SHARDS])
    (root / "test" / "nshards.txt").write_text(f"{SHARDS}\n", encoding="utf-8")
    (root / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")


def _opaque(path: Path) -> Image.Image:
    """On white and higher than wide. What lies behind a transparent picture is white here, and there whatever colour
    its invisible pixels have."""
    with Image.open(path) as image:
        square = flatten(image.convert("RGBA"))
    canvas = Image.new("RGB", (64, 80), "white")
    canvas.paste(square, (0, 8))
    return canvas


def _sample(number: int, picture: Image.Image, label: int, captions: list[str]) -> TinySample:
    encoded, marks = io.BytesIO(), io.BytesIO()
    extension, form = ("jpg", "JPEG") if number % 2 else ("png", "PNG")
    picture.save(encoded, form)
    np.save(marks, np.isin(np.arange(CLASSES), [label, (label + 7) % CLASSES]).astype(np.int64))
    members = {
        extension: encoded.getvalue(),
        "cls": str(label).encode(),
        "npy": marks.getvalue(),
        "txt": "\n".join(captions).encode(),
    }
    return TinySample(f"s{number:04d}", members)


def _trained(pairs: list[tuple[Image.Image, str]]) -> DualEncoder:
    """A few steps on the very pictures: enough to be far from chance, and from perfect."""
    model = dual_encoder.build(from_tree(ModelConfig, MODEL), seed=0)
    images = torch.stack([evaluation_view(picture, SIDE) for picture, _ in pairs])
    tokens = model.tokenizer([caption for _, caption in pairs])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        drawn = torch.randperm(len(pairs), generator=generator)[:64]
        found = model(images[drawn], tokens[drawn])
        loss = contrastive_loss(found.image_features, found.text_features, found.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


# --- both sides ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, dict[str, float]]:
    python = peer_python()
    assert python is not None
    classes, captions = peer_views(folder / "set", folder / "views")
    roots = json.dumps({"classes": str(classes), "captions": str(captions), "labels": str(folder / "labels")})
    compat = ROOT / "src" / "diptych" / "compat.py"
    command = [python, "-I", "-", str(compat), str(folder / "model"), roots]
    done = subprocess.run(command, input=PEER, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_peer
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_numbers_are_the_same(
    case: Case, folder: Path, theirs: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    config = from_tree(EvalConfig, {"tasks": [case.tree(folder)], "embed": {"batch_size": 16}})
    evaluate(load(str(folder / "model")), config, out=tmp_path / "evaluation")
    (row,) = rows(*open_folders([tmp_path / "evaluation"]))
    assert row["metrics"] == pytest.approx(theirs[case.name], abs=case.tolerance)
    low, high = (row["metrics"][name] for name in case.apart)
    assert 0.1 < low <= high < 1.0  # chance is 0.05 at most
