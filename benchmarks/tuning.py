"""What tuning gives on the bundled pictures, and what LoRA costs beside tuning everything.

python benchmarks/tuning.py shots     # k pictures of each group by an artist that training never saw; base to new
python benchmarks/tuning.py pairs     # skin tone x person: trained on some pairs, measured on all
python benchmarks/tuning.py cost      # seconds and memory of a step, LoRA and everything

Needs `make demo` (pictures, shards and the base, demo/run). Prints Markdown.
"""

import argparse
import csv
import hashlib
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from diptych.bench.isolated import PeakMeter, hardware, in_process
from diptych.config import from_tree, load
from diptych.data import index
from diptych.encoder import load as load_model
from diptych.models import dual_encoder
from diptych.models.dual_encoder import ModelConfig
from diptych.optim import optimizers
from diptych.optim.optimizers import OptimConfig
from diptych.testing import TinySample, write_shard
from diptych.train.loop import train
from diptych.train.recipe import Recipe
from diptych_eval.embedder import Embedder
from diptych_eval.protocols import fewshot, page
from diptych_eval.protocols.baselines import mean_and_interval
from diptych_eval.protocols.plan import FewShotPlan
from diptych_eval.tasks.unseen_pairs import UnseenPairs

PICTURES, BASE = Path("demo/pictures"), "demo/run"
TEST_SHARE = 4
SEEDS = (0, 1, 2)


def rows(*tables: str) -> list[dict[str, str]]:
    """Lines of the tables that `diptych data emoji` wrote."""
    found = []
    for table in tables:
        with (PICTURES / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            found += list(csv.DictReader(file))
    return found


# --- shots -------------------------------------------------------------------------------------------------------


def shots(work: Path) -> None:
    """Groups of Unicode, drawn by OpenMoji; a quarter of the pictures is measured."""
    for row in rows("openmoji_seen", "openmoji_unseen"):
        if row["group"] != "Component":
            is_test = hashlib.sha256(row["code"].encode()).digest()[0] % TEST_SHARE == 0
            folder = work / "groups" / ("test" if is_test else "train") / row["group"]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(PICTURES / row["image"], folder)
    for split in ("all", "base_to_new"):
        changes = [f"root={work / 'groups'}", f"out={work / split}", f"split={split}"]
        plan = load(FewShotPlan, Path("configs/tune/fewshot.yaml"), changes)
        measured = fewshot.run(plan)
        page.write_page(measured, "OpenMoji by group", work / split / "fewshot.html")
        print("\n\n".join(table.markdown() for table in page.tables(measured)), flush=True)


# --- pairs -------------------------------------------------------------------------------------------------------


def pairs(work: Path) -> None:
    """CSP beside plain prompts: trained on some pairs of tone and person by two artists, measured on all by others."""
    everything = [line.strip() for line in (PICTURES / "composition/classnames.txt").read_text("utf-8").splitlines()]
    training = [row for row in rows("train") if row["tone"]]
    unseen = {row["name"] for row in rows("composition")}
    trained = [name for name in everything if name not in unseen]
    _write(work / "pairs/train", training, trained)
    test = [dict(row, image=row["image"].replace("noto", artist)) for artist in ("openmoji", "fluent")
            for row in rows("train", "composition") if row["tone"] and row["artist"] == "noto"]  # fmt: skip
    _write(work / "pairs/test", test, everything)
    (work / "pairs/classnames.txt").write_text("\n".join(everything), encoding="utf-8")
    (work / "pairs/trained.txt").write_text("\n".join(trained), encoding="utf-8")
    (work / "pairs/zeroshot_classification_templates.txt").write_text("{c}\n", encoding="utf-8")
    objects, attributes = ({name.split(": ")[part] for name in everything} for part in (0, 1))
    csp = {"type": "compositional", "attributes": sorted(attributes), "objects": sorted(objects)}
    form = "{object}: {attribute}"
    methods: dict[str, list[dict[str, Any]]] = {
        "plain prompt (zero-shot)": [],
        "CoOp": [{"type": "context", "length": 4, "classes": trained}],
        "CSP": [csp | {"pattern": form, "template": form, "classes": trained}],
    }
    task = UnseenPairs("pairs", str(work / "pairs"), str(work / "pairs/trained.txt"))
    print("| | AUC | best harmonic mean | trained pairs | untrained pairs |\n|---|--:|--:|--:|--:|")
    for name, adapters in methods.items():
        found: dict[str, list[float]] = {}
        for seed in SEEDS if adapters else SEEDS[:1]:
            run = _tune(work, name, adapters, seed) if adapters else BASE
            for figure, value in task.run(Embedder(load_model(run))).metrics.items():
                found.setdefault(figure, []).append(value)
        cells = [page.Figure(*mean_and_interval(values)).text for values in found.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _write(folder: Path, table: list[dict[str, str]], names: list[str]) -> None:
    samples = [
        TinySample(
            f"{number:06d}",
            {
                "webp": (PICTURES / row["image"]).read_bytes(),
                "cls": str(names.index(row["name"])).encode(),
                "txt": row["name"].encode(),
            },
        )
        for number, row in enumerate(table)
    ]
    shard = write_shard(folder / "000000.tar", samples)
    index.write(shard, index.scan(shard))


def _tune(work: Path, name: str, adapters: list[dict[str, Any]], seed: int) -> str:
    tree = {
        "run": str(work / "runs" / f"{name}-{seed}"),
        "seed": seed,
        "total_samples": 6400,
        "global_batch": 64,
        "model": {"towers": {"type": "run", "run": BASE}, "adapters": adapters},
        "data": {"shards": str(work / "pairs/train"), "lanes": 1, "workers": 0, "labels": True},
        "objective": {"contrastive": {"weight": 0}, "regularisers": [{"type": "classification"}]},
        "optim": {"peak_lr": 1e-3, "weight_decay": 0.0, "schedule": {"warmup_samples": 640}},
        "log": {"tensorboard": False},
    }
    return str(train(from_tree(Recipe, tree)).root)


# --- cost --------------------------------------------------------------------------------------------------------

COSTED: dict[str, list[dict[str, Any]]] = {
    "everything": [],
    "LoRA, queries and values": [{"type": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}],
    "LoRA, all layers": [{"type": "lora", "rank": 4}],  # as in `shots`
}
MODEL, BATCH, STEPS, WARMUP = "ViT-S-32-alt", 32, 8, 2


def cost(work: Path) -> None:
    """A step of the towers, everything or LoRA alone, in some of the layers or in all."""
    print(f"{hardware('cpu')}, torch {torch.__version__}; {MODEL}, batches of {BATCH}, fp32\n")
    print("| | trained | of all | s per step | of everything's | extra MiB | of everything's |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    found = {name: in_process(_cost, adapters) for name, adapters in COSTED.items()}
    all_seconds, all_bytes = found["everything"][2:]
    for name, (trained, share, seconds, extra) in found.items():
        print(
            f"| {name} | {trained:,} | {100 * share:.2f}% | {seconds:.2f} | {seconds / all_seconds:.2f} | "
            f"{extra / 2**20:,.0f} | {extra / all_bytes:.2f} |"
        )


def _cost(adapters: list[dict[str, Any]]) -> tuple[int, float, float, int]:
    towers = {"type": "open_clip", "name": MODEL}
    model = dual_encoder.build(from_tree(ModelConfig, {"towers": towers, "adapters": adapters}), seed=0)
    total, trained = dual_encoder.count(model)
    images = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    tokens = model.tokenizer([f"a photo of a red fox number {i}" for i in range(BATCH)])[:, :16]
    meter, seconds = PeakMeter("cpu"), []
    optimizer = optimizers.build(OptimConfig(), model, torch.nn.Module())
    for _ in range(STEPS):
        start = time.perf_counter()
        found = model(images, tokens)
        logits = found.logit_scale * found.image_features @ found.text_features.T
        torch.nn.functional.cross_entropy(logits, torch.arange(BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return trained, trained / total, statistics.median(seconds[WARMUP:]), meter.extra_bytes()


def main() -> None:
    """One of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("shots", "pairs", "cost"))
    parser.add_argument("--work", type=Path, default=Path("runs/tuning"), help="folder of runs and sets")
    options = parser.parse_args()
    {"shots": shots, "pairs": pairs, "cost": cost}[options.what](options.work)


if __name__ == "__main__":
    main()
