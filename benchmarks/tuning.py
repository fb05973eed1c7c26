"""What tuning gives on the bundled pictures, and what LoRA costs beside tuning everything.

python benchmarks/tuning.py shots     # k pictures of each group by an artist that training never saw; base to new
python benchmarks/tuning.py pairs     # skin tone x person: trained on some pairs, measured on all
python benchmarks/tuning.py keeping   # new names: how far they are learned, and old ones forgotten
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
from diptych.config import from_tree, load, merge, read_yaml
from diptych.data import index
from diptych.encoder import ModelEncoder
from diptych.encoder import load as load_model
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.interpolate import interpolate
from diptych.models.merge import merged
from diptych.models.run import open_run
from diptych.optim import optimizers
from diptych.optim.optimizers import OptimConfig
from diptych.runfolder import RunFolder
from diptych.testing import TinySample, write_shard
from diptych.train.loop import train
from diptych.train.recipe import Recipe
from diptych_eval.embedder import Embedder
from diptych_eval.protocols import fewshot, page
from diptych_eval.protocols.baselines import mean_and_interval
from diptych_eval.protocols.plan import FewShotPlan
from diptych_eval.tasks.unseen_pairs import UnseenPairs
from diptych_eval.tasks.zeroshot import ZeroShot

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
            folder = work / "groups" / ("test" if _is_test(row) else "train") / row["group"]
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


# --- keeping -----------------------------------------------------------------------------------------------------

ALL_LEARN: dict[str, Any] = {"optim": {"peak_lr": 3e-4}}
LORA: dict[str, Any] = {
    "model": {"adapters": [{"type": "lora", "rank": 24, "alpha": 96}]},
    "optim": {"peak_lr": 2e-3},
}
KEEPING: dict[str, tuple[dict[str, Any], bool, float]] = {
    "full": (ALL_LEARN, False, 1.0),
    "full, half way (WiSE-FT)": (ALL_LEARN, False, 0.5),
    "full, a quarter replayed": (ALL_LEARN, True, 1.0),
    "LoRA": (LORA, False, 1.0),
    "LoRA, a quarter replayed": (LORA, True, 1.0),
}
"""Name → settings, whether old pictures are mixed in, and how far from the base to the tuned weights the model lies."""


KEPT = {"new": "fluent_unseen", "old": "train", "others": "fluent_seen"}
"""What is measured → table."""


def keeping(work: Path) -> None:
    """New names from OpenMoji's pictures; measured among all names: Fluent's pictures of the new names and of the old
    ones, and a quarter of the pictures that the base was trained on."""
    table = {name: [row for row in rows(name) if not row["tone"]] for name in (*KEPT.values(), "openmoji_unseen")}
    names = sorted({row["name"] for some in table.values() for row in some})
    learned = {row["name"] for row in table["openmoji_unseen"]}
    folder = work / "keeping"
    _write(folder / "train", table["openmoji_unseen"], names)
    counts = {}
    for part, name in KEPT.items():
        measured = [row for row in table[name] if (row["name"] in learned if part == "new" else _is_test(row))]
        _write(folder / part / "test", measured, names)
        (folder / part / "classnames.txt").write_text("\n".join(names), encoding="utf-8")
        (folder / part / "zeroshot_classification_templates.txt").write_text("{c}\n", encoding="utf-8")
        counts[part] = len(measured)
    heads = [f"new names, by Fluent ({counts['new']})", f"old pictures ({counts['old']})",
             f"old names, by Fluent ({counts['others']})"]  # fmt: skip
    print(f"| zero-shot top-1 among {len(names):,} names | {' | '.join(heads)} |\n|---|{'--:|' * len(heads)}")
    base = _top1(load_model(BASE).model, folder)
    print(f"| before | {' | '.join(f'{100 * value:.1f}' for value in base)} |", flush=True)
    for name, (settings, replays, share) in KEEPING.items():
        tuned = [_top1(_kept(work, settings, seed, replays=replays, share=share), folder) for seed in SEEDS]
        cells = [page.Figure(*mean_and_interval(list(values))).text for values in zip(*tuned, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _is_test(row: dict[str, str]) -> bool:
    return hashlib.sha256(row["code"].encode()).digest()[0] % TEST_SHARE == 0


def _kept(work: Path, settings: dict[str, Any], seed: int, *, replays: bool, share: float) -> DualEncoder:
    """The tuned model; the same run serves all shares."""
    kind = "-".join(("lora" if "model" in settings else "full", "replay" if replays else "alone", str(seed)))
    new = {"name": "new", "shards": str(work / "keeping/train"), "weight": 3, "lanes": 1}
    old = {"name": "old", "shards": "demo/shards/train", "weight": 1, "lanes": 6}
    own = {"captions": {"views": [{"columns": ["txt"]}]}}, {"captions": {"views": [{"columns": ["name"]}]}}
    tree = {
        "run": str(work / "runs" / f"keeping-{kind}"),
        "seed": seed,
        "data": {"sources": [new | own[0], old | own[1]] if replays else [new | own[0]]},
    }
    images = read_yaml(Path("configs/pretrain/emoji.yaml"))["data"]["images"]
    fixed = {"total_samples": 20480, "global_batch": 128, "data": {"workers": 0, "images": images}}
    recipe = merge(merge(read_yaml(Path("configs/tune/replay.yaml")), fixed), tree)
    recipe |= {"model": {"towers": {"type": "run", "run": BASE}}, "evaluate": {}}
    run = train(from_tree(Recipe, merge(recipe, settings)))
    tuned = merged(open_run(RunFolder(run.root)))
    return tuned if share == 1 else interpolate(load_model(BASE).model, tuned, share)


def _top1(model: DualEncoder, folder: Path) -> list[float]:
    embedder = Embedder(ModelEncoder(model))
    return [ZeroShot(part, str(folder / part)).run(embedder).metrics["top1"] for part in KEPT]


# --- cost --------------------------------------------------------------------------------------------------------

COSTED: dict[str, list[dict[str, Any]]] = {
    "everything": [],
    "LoRA, queries and values": [{"type": "lora", "rank": 24, "targets": ["q_proj", "v_proj"]}],
    "LoRA, all layers": [{"type": "lora", "rank": 24}],  # as in `shots`
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
    parser.add_argument("what", choices=("shots", "pairs", "keeping", "cost"))
    parser.add_argument("--work", type=Path, default=Path("runs/tuning"), help="folder of runs and sets")
    options = parser.parse_args()
    {"shots": shots, "pairs": pairs, "keeping": keeping, "cost": cost}[options.what](options.work)


if __name__ == "__main__":
    main()
