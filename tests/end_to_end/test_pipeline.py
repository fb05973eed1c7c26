"""The newcomer's path on a slice of the bundled pictures: emoji → pack → train → eval → report → export."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from PIL import Image

from diptych.cli import main
from diptych.encoder import load

NUM_CONCEPTS = 24
RECIPE = {
    "total_samples": 6400,
    "global_batch": 32,
    "precision": "fp32",
    "ema_decay": 0.98,
    "model": {
        "towers": {
            "type": "open_clip",
            "embed_dim": 32,
            "vision": {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 32},
            "text": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
        }
    },
    "data": {
        "lanes": 2,
        "workers": 1,
        "cache_mib": 8,
        "images": {"min_crop": 1, "augment": {"shift": 0.05}},
        "captions": {"views": [{"columns": ["name"]}, {"columns": ["name", "keywords"], "max_texts": 2}]},
    },
    "objective": {"contrastive": {"targets": "same_caption"}},
    "optim": {"peak_lr": 3e-3, "schedule": {"warmup_samples": 640}},
    "log": {"every_steps": 20, "tensorboard": True},
}


@dataclass(frozen=True)
class Demo:
    """What the commands left behind."""

    root: Path
    summary: dict[str, float]

    @property
    def run(self) -> Path:
        return self.root / "run"


def diptych(*arguments: object) -> None:
    assert main([*map(str, arguments), "--quiet"]) == 0


def slice_of(source: Path, out: Path) -> Path:
    """The rows of the first concepts that every artist drew, relabelled by their order in `NAMES`."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if row["group"] == "Animals & Nature"]
    names = sorted({row["name"] for row in kept})[:NUM_CONCEPTS]
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0]])
        writer.writeheader()
        writer.writerows(row | {"label": names.index(row["name"])} for row in kept if row["name"] in names)
    (out.parent / "names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    pictures = root / "pictures"
    diptych("data", "emoji", pictures)
    columns = ["captions=[name,keywords,name_zh,keywords_zh]", 'separator=" | "']
    train, test = (
        slice_of(pictures / f"{name}.csv", pictures / f"slice_{name}.csv") for name in ("train", "fluent_seen")
    )
    diptych("data", "pack", train, root / "train", *columns, "samples_per_shard=16")
    benchmark = ["layout=benchmark", "label=label", f"classes={pictures / 'names.txt'}"]
    for name, table in (("seen", train), ("fluent", test)):
        diptych("data", "pack", table, root / name, *columns, *benchmark, f"templates={pictures / 'templates.txt'}")
    (root / "run.yaml").write_text(yaml.safe_dump(RECIPE))
    diptych("train", root / "run.yaml", f"run={root / 'run'}", f"data.shards={root / 'train'}")
    tasks = [{"type": "zeroshot", "dataset": name, "root": str(root / name)} for name in ("seen", "fluent")]
    forms = [["name"], ["name", "keywords"]]
    tasks.append({"type": "retrieval", "dataset": "fluent", "path": str(root / "fluent" / "test"), "forms": forms})
    (root / "eval.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    diptych("eval", root / "run", "--config", root / "eval.yaml")
    results = json.loads((root / "run" / "eval" / "results.json").read_text())["results"]
    summary = {f"{item['task']}/{item['dataset']}/{k}": v for item in results for k, v in item["metrics"].items()}
    return Demo(root, summary)


def test_the_model_beats_chance_on_an_artist_it_never_saw(demo: Demo) -> None:
    assert demo.summary["zeroshot/seen/top1"] > 0.8  # pictures it was trained on
    assert demo.summary["zeroshot/fluent/top1"] > 4 / NUM_CONCEPTS
    assert demo.summary["retrieval/fluent/text_to_image/recall@5"] > 2 * 5 / NUM_CONCEPTS


def test_the_run_folder_is_complete(demo: Demo) -> None:
    for name in ("config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "eval/results.json", "report.html"):
        assert (demo.run / name).exists(), name


def test_the_report_needs_nothing_but_itself(demo: Demo) -> None:
    page = (demo.run / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)=["']([^"'#]+)""", page)
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert "<script" not in page
    for heading in (
        "Zero-shot classification",
        "Image-text retrieval",
        "Training",
        "Worst confusions",
        "Embedding map",
    ):
        assert heading in page


def test_evaluating_again_reuses_the_results(demo: Demo) -> None:
    before = (demo.run / "eval" / "results.json").read_bytes()
    diptych("eval", demo.run, "--config", demo.root / "eval.yaml")
    assert (demo.run / "eval" / "results.json").read_bytes() == before


def test_exported_weights_give_the_same_features_in_open_clip(demo: Demo) -> None:
    folder = demo.root / "exported"
    diptych("export", demo.run, folder, "--to", "open_clip")
    ours = load(str(demo.run))
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}", precision="fp32")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    names = (demo.root / "pictures" / "names.txt").read_text(encoding="utf-8").split("\n")[:-1]
    paths = sorted((demo.root / "pictures" / "pictures" / "noto").iterdir())[:8]
    pictures = [Image.open(path).convert("RGBA") for path in paths]
    flat = [Image.alpha_composite(Image.new("RGBA", p.size, "white"), p).convert("RGB") for p in pictures]
    from diptych.data.images import evaluation_view

    with torch.inference_mode():
        their_images = theirs.encode_image(torch.stack([preprocess(p) for p in flat]), normalize=True)
        their_texts = theirs.encode_text(tokenizer(names), normalize=True)
    views = torch.stack([evaluation_view(picture, ours.image_size) for picture in pictures])
    torch.testing.assert_close(ours.encode_image(views), their_images, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_text(names), their_texts, atol=1e-5, rtol=0)
    assert theirs.logit_scale.item() == pytest.approx(ours.model.logit_scale.item())
    again = load(f"open_clip:{folder}")
    torch.testing.assert_close(again.encode_text(names), their_texts, atol=1e-5, rtol=0)
    assert main(["export", str(demo.run), str(folder)]) == 2  # not empty


def test_training_again_adds_nothing(demo: Demo) -> None:
    before = (demo.run / "metrics.jsonl").read_bytes()
    diptych("train", demo.root / "run.yaml", f"run={demo.run}", f"data.shards={demo.root / 'train'}")
    assert (demo.run / "metrics.jsonl").read_bytes() == before
