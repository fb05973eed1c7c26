"""Our trainer and open_clip's own on the same pictures, the same cores and, for throughput, the same architecture.

python benchmarks/emoji_peer.py accuracy   --peer .peer/bin/python   # both recipes whole, then the bundled tests
python benchmarks/emoji_peer.py throughput --peer .peer/bin/python   # the peer's architecture under both, alternating
python benchmarks/emoji_peer.py export                               # demo/run's features here and in open_clip

The peer needs an environment of its own; benchmarks/README.md says which. Needs `make demo` (pictures and shards).
"""

import argparse
import csv
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
import yaml

from diptych.config import from_tree, read_yaml
from diptych.data.images import decode, flatten
from diptych.data.loader import read_split
from diptych.encoder import ModelEncoder
from diptych.encoder import load as load_model
from diptych.log import read_metrics
from diptych.models import dual_encoder
from diptych.models.dual_encoder import ModelConfig
from diptych_eval.suite import EvalConfig, evaluate

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
VISION = {"layers": 6, "width": 192, "patch_size": 16, "image_size": 64, "head_width": 64}
TEXT = {"width": 192, "heads": 3, "layers": 3}
EMBED_DIM, BATCH = 192, 256
# torchvision's wheels beside a CPU build of torch lack their compiled operators; the peer imports it all the same.
START = """
import sys, torch
lib = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"): lib.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import open_clip
open_clip.add_model_config(sys.argv.pop(1))
from open_clip_train.main import main
main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    seconds: float
    """Wall clock of the whole command, imports included."""
    samples_per_second: float
    """Median over the logged steps."""


def main() -> int:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "throughput", "export"])
    parser.add_argument("--peer", type=Path, help="python of the peer's environment")
    parser.add_argument("--work", type=Path, default=ROOT / "demo" / "peer", help="folder for what is made on the way")
    parser.add_argument("--epochs", type=int, default=40, help="accuracy: epochs of the peer")
    parser.add_argument("--rounds", type=int, default=2, help="throughput: runs of each")
    parser.add_argument("--context", type=int, default=77, help="throughput: context length of the text tower")
    options = parser.parse_args()
    if options.what == "export":
        export_parity(options.work)
        return 0
    if options.peer is None:
        parser.error("--peer is needed")
    options.work.mkdir(parents=True, exist_ok=True)
    shards = peer_shards(options.work / "shards")
    if options.what == "accuracy":
        accuracy(options, shards)
    else:
        throughput(options, shards)
    return 0


def peer_shards(out: Path) -> Path:
    """The training pictures on white as PNG, each with `name, keyword, keyword …`: the peer knows no transparency."""
    if out.exists():
        return out
    out.mkdir()
    with (DEMO / "pictures" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number in range(6):
        with tarfile.open(out / f"{number:06d}.tar", "w") as tar:
            for i, row in list(enumerate(rows))[number::6]:
                buffer = io.BytesIO()
                flatten(decode((DEMO / "pictures" / row["image"]).read_bytes())).save(buffer, "PNG")
                caption = ", ".join([row["name"], *filter(None, row["keywords"].split(" | "))])
                for name, data in (("png", buffer.getvalue()), ("txt", caption.encode())):
                    entry = tarfile.TarInfo(f"{i:06d}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return out


def train_peer(options: argparse.Namespace, shards: Path, name: str, *, epochs: int, context_length: int) -> Trained:
    """open_clip's trainer; its logs and checkpoints go to `work/logs/name`."""
    config = options.work / f"peer-{context_length}.json"
    text = TEXT | {"context_length": context_length}
    config.write_text(json.dumps({"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": text}))
    num_samples = len((DEMO / "pictures" / "train.csv").read_text(encoding="utf-8").splitlines()) - 1
    command = [str(options.peer), "-c", START, str(config)]
    command += [
        "--model",
        config.stem,
        "--train-data",
        f"{shards}/{{000000..000005}}.tar",
        "--dataset-type",
        "webdataset",
    ]
    command += ["--train-num-samples", str(num_samples), "--epochs", str(epochs), "--batch-size", str(BATCH)]
    command += ["--workers", "1", "--device", "cpu", "--precision", "fp32", "--lr", "1e-3", "--wd", "0.1"]
    command += ["--warmup", "50", "--save-frequency", str(epochs), "--log-every-n-steps", "1"]
    command += ["--logs", str(options.work / "logs"), "--name", name]
    shutil.rmtree(options.work / "logs" / name, ignore_errors=True)
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-3000:]}")
    rates = [float(rate) for rate in re.findall(r"([\d.]+)/s,", done.stdout + done.stderr)]
    return Trained(seconds, statistics.median(rates[len(rates) // 5 :]))


def train_ours(config: Path, run: Path, *settings: str) -> Trained:
    """`diptych train`, afresh."""
    command = [sys.executable, "-m", "diptych", "train", str(config), f"run={run}", "--overwrite", "--quiet", *settings]
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    seconds = time.monotonic() - start
    rows = read_metrics(run / "metrics.jsonl")
    rates = [row["train/samples_per_second"] for row in rows if row.get("train/samples_per_second")]
    return Trained(seconds, statistics.median(rates[len(rates) // 5 :]))


def scores(encoder: ModelEncoder) -> dict[str, float]:
    """Zero-shot figures on the bundled tests."""
    tree = read_yaml(ROOT / "configs" / "eval" / "emoji.yaml")
    tasks = [task for task in tree["tasks"] if task["type"] == "zeroshot" and "skin" not in task["dataset"]]
    for task in tasks:
        task["root"] = str(ROOT / task["root"])
    results = evaluate(encoder, from_tree(EvalConfig, {"tasks": tasks}))
    return {f"{item.dataset} {name}": item.metrics[name] for item in results for name in ("top1", "top5")}


def accuracy(options: argparse.Namespace, shards: Path) -> None:
    """Both recipes from start to end, measured by the same code."""
    ours = train_ours(ROOT / "configs" / "pretrain" / "emoji.yaml", options.work / "ours")
    our_scores = scores(load_model(str(options.work / "ours")))
    peer = train_peer(options, shards, "accuracy", epochs=options.epochs, context_length=77)
    weights = options.work / "logs" / "accuracy" / "checkpoints" / f"epoch_{options.epochs}.pt"
    towers = {"type": "open_clip", "name": str(options.work / "peer-77.json"), "weights": str(weights)}
    peer_scores = scores(ModelEncoder(dual_encoder.build(from_tree(ModelConfig, {"towers": towers}), seed=0)))
    header()
    print("| | ours | open_clip | ratio |\n|---|--:|--:|--:|")
    print(f"| training, wall clock | {ours.seconds:.0f} s | {peer.seconds:.0f} s | {ours.seconds / peer.seconds:.2f} |")
    for name, value in our_scores.items():
        other = peer_scores[name]
        ratio = f"{value / other:.1f}" if other else "–"
        print(f"| {name} | {value:.1%} | {other:.1%} | {ratio} |")


def throughput(options: argparse.Namespace, shards: Path) -> None:
    """The peer's architecture and batch under both trainers, alternating; `fp32` and, where there is one, `bf16`."""
    found: dict[str, list[float]] = {}
    length = options.context
    for number in range(options.rounds):
        peer = train_peer(options, shards, f"speed-{number}-{length}", epochs=2, context_length=length)
        found.setdefault("open_clip, fp32", []).append(peer.samples_per_second)
        for precision in ("fp32", "auto"):
            config = options.work / "same.yaml"
            config.write_text(yaml.safe_dump(same_architecture(length)))
            trained = train_ours(config, options.work / "same", f"precision={precision}")
            found.setdefault(f"ours, {precision}", []).append(trained.samples_per_second)
    header()
    print(f"| context length {length} | samples/s, median of runs | runs | ratio to open_clip |\n|---|--:|---|--:|")
    for name, rates in found.items():
        floor = statistics.median(found["open_clip, fp32"])
        median = statistics.median(rates)
        print(f"| {name} | {median:.0f} | {', '.join(f'{rate:.0f}' for rate in rates)} | {median / floor:.2f} |")


def export_parity(work: Path) -> None:
    """Largest difference of any feature of OpenMoji's pictures and all names."""
    shutil.rmtree(work / "exported", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "diptych", "export", DEMO / "run", work / "exported", "--quiet"], check=True)
    ours = load_model(str(DEMO / "run"))
    theirs = open_clip.create_model_from_pretrained(f"local-dir:{work / 'exported'}", return_transform=False).eval()
    names = (DEMO / "pictures" / "classnames.txt").read_text(encoding="utf-8").splitlines()
    tokens = open_clip.get_tokenizer(f"local-dir:{work / 'exported'}")(names)
    views = [sample.image for sample in read_split(str(DEMO / "shards" / "openmoji_seen" / "test"), ours.image_size)]
    images = torch.stack(views)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (theirs.visual.image_mean, theirs.visual.image_std))
    with torch.inference_mode():
        image_features = theirs.encode_image((images / 255 - mean) / std, normalize=True)
        text_features = theirs.encode_text(tokens, normalize=True)
    header()
    for kind, a, b in (
        ("image", ours.encode_image(images), image_features),
        ("text", ours.encode_text(names), text_features),
    ):
        print(f"{kind} features {list(a.shape)}: largest difference {(a - b).abs().max():.1e}")


def same_architecture(context_length: int) -> dict[str, Any]:
    """The peer's model, batch, captions and crops as a recipe of ours."""
    text = TEXT | {"context_length": context_length}
    return {
        "total_samples": 256 * 30,
        "global_batch": BATCH,
        "model": {"towers": {"type": "open_clip", "embed_dim": EMBED_DIM, "vision": VISION, "text": text}},
        "data": {
            "shards": str(DEMO / "shards" / "train"),
            "lanes": 6,
            "workers": 1,
            "captions": {"views": [{"columns": ["name", "keywords"], "max_texts": 100}]},
        },
        "optim": {"peak_lr": 1e-3, "weight_decay": 0.1, "schedule": {"warmup_samples": 12800}},
        "log": {"every_steps": 1, "tensorboard": False},
    }


def header() -> None:
    """The machine and the versions."""
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    flags = "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "no bf16"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch", "accelerate"))
    print(f"\n{os.cpu_count()} cores of {cpu} ({flags}); {versions}\n")


if __name__ == "__main__":
    sys.exit(main())
