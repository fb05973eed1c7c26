"""What hard captions teach the demo's model, and what it forgets over them.

python benchmarks/composition.py words    # one word is another
python benchmarks/composition.py order    # the same words in another order: two pictures beside each other

Needs `make demo`. Writes negatives for the training set and, by another seed, for an artist that training never saw;
tunes plainly, as NegCLIP and as DeGLA, equally long; prints Markdown: accuracy on the artist's negatives by kind, that
of a classifier that sees no picture, and zero-shot accuracy on the artist.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path

from PIL import Image

from diptych.config import load
from diptych.encoder import load as load_model
from diptych.train.loop import train
from diptych.train.recipe import Recipe
from diptych_eval.embedder import Embedder
from diptych_eval.protocols.baselines import mean_and_interval
from diptych_eval.protocols.page import Figure
from diptych_eval.tasks.composition import Composition
from diptych_eval.tasks.zeroshot import ZeroShot

BASE, ARTIST = "demo/run", "demo/shards/openmoji_seen"
PICTURES = Path("demo/pictures")
SEEDS = (0, 1, 2)
METHODS = {
    "plain": ("configs/tune/negclip.yaml", ["objective.contrastive.candidates=[]", "data.captions.hard=null"]),
    "NegCLIP": ("configs/tune/negclip.yaml", []),
    "DeGLA": ("configs/tune/composition.yaml", []),
    "DeGLA, own captions × 40": ("configs/tune/composition.yaml", ["objective.regularisers.0.weight=4"]),
}
COLLAGES = {"train": ("train", 6000), "test": ("openmoji_seen", 1500)}
"""Part → table of the demo's pictures, and how many collages are made of them."""
ORDER_RULES = "rules=[swap, order]"
ORDER_CHANGES = ["optim.peak_lr=1e-3", "total_samples=20000"]
FEWEST = 100
"""Examples of a kind that has a row of its own."""


def prepare(work: Path) -> None:
    """Negatives and the blind test of those that are measured."""
    for source, name, seed in (("demo/shards/train", "train", 0), (f"{ARTIST}/test", "test", 1)):
        _negatives(source, work / name, f"seed={seed}")
    _blind(work)


def prepare_order(work: Path) -> None:
    """Two pictures by one artist, left and right or above and below, and captions that say so."""
    for seed, (part, (table, count)) in enumerate(COLLAGES.items()):
        pictures = work / "collages" / part
        if not (pictures / "all.csv").is_file():
            _collages(table, count, pictures, seed)
            _diptych("data", "pack", str(pictures / "all.csv"), str(work / "shards" / part), "captions=[name]")
        _negatives(str(work / "shards" / part), work / part, f"seed={seed}", ORDER_RULES)
    _negatives("demo/shards/train", work / "pictures", "seed=0")
    _blind(work)


def _collages(table: str, count: int, folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    with (PICTURES / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        plain = [row for row in csv.DictReader(file) if len(row["name"].split()) <= 2 and not row["tone"]]
    plain = [row for row in plain if row["name"].replace(" ", "").isalpha()]
    artists = sorted({row["artist"] for row in plain})
    lines = [["image", "name"]]
    for number in range(count):
        pair = rng.sample([row for row in plain if row["artist"] == artists[number % len(artists)]], 2)
        across = rng.random() < 0.5
        canvas = Image.new("RGBA", (72, 72), "white")
        for place, row in enumerate(pair):
            with Image.open(PICTURES / row["image"]) as opened:
                half = opened.convert("RGBA").resize((36, 36))
            canvas.alpha_composite(half, (36 * place, 18) if across else (18, 36 * place))
        canvas.convert("RGB").save(folder / f"{number:05d}.png")
        first, second = (row["name"] for row in pair)
        lines.append([f"{number:05d}.png", f"{first} {'left of' if across else 'above'} {second}"])
    with (folder / "all.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)


def _negatives(shards: str, out: Path, *settings: str) -> None:
    if not (out / "negatives.json").is_file():
        _diptych("data", "negatives", shards, str(out), "columns=[name]", "without=drop", *settings, "--overwrite")


def _blind(work: Path) -> None:
    """The blind test of what is measured."""
    (work / "blind.json").write_text(_diptych("data", "blind", str(work / "test"), "--json"), encoding="utf-8")


def _diptych(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "diptych", *words], check=True, capture_output=True, text=True).stdout


def tuned(work: Path, method: str, seed: int, changes: list[str]) -> str:
    """The run, trained unless it is there."""
    config, own = METHODS[method]
    settings = [f"run={work / method}-{seed}", f"seed={seed}", *own, *changes]
    return str(train(load(Recipe, Path(config), settings)).root)


def measure(work: Path, model: str) -> dict[str, float]:
    """Accuracy by kind of negative, and zero-shot accuracy."""
    embedder = Embedder(load_model(model))
    found = Composition("negatives", str(work / "test"), each="negative", blind=work / "blind.json").run(embedder)
    zeroshot = ZeroShot("names", ARTIST).run(embedder)
    return found.metrics | {"zero-shot": zeroshot.metrics["top1"]}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("words", "order"))
    parser.add_argument("--work", type=Path, default=Path("runs/composition"), help="folder of sets and runs")
    parser.add_argument("changes", nargs="*", help="settings of all runs, such as total_samples=20000")
    options = parser.parse_args()
    work: Path = options.work / options.what
    if options.what == "words":
        prepare(work)
        changes = [f"data.shards={work / 'train'}"]
    else:
        prepare_order(work)
        sources = [
            {"name": "pictures", "shards": str(work / "pictures"), "weight": 3, "lanes": 6},
            {"name": "collages", "shards": str(work / "train"), "weight": 1, "lanes": 6},
        ]
        changes = ["data.shards=null", f"data.sources={json.dumps(sources)}", *ORDER_CHANGES]
    rows = {"the demo's model": [measure(work, BASE)]}
    for method in METHODS:
        rows[method] = [measure(work, tuned(work, method, seed, [*changes, *options.changes])) for seed in SEEDS]
    pairs = {kind: one["pairs"] for kind, one in json.loads((work / "blind.json").read_text("utf-8"))["kinds"].items()}
    kinds = [kind for kind, count in pairs.items() if count >= FEWEST and kind != "all"]
    columns = ["accuracy", "accuracy/mean_of_groups", *(f"accuracy/{kind}" for kind in kinds), "zero-shot"]
    heads = ["all negatives", "mean of kinds", *(f"{kind} ({pairs[kind]:,})" for kind in kinds), "zero-shot top-1"]
    print(f"| | {' | '.join(heads)} |\n|---|{'--:|' * len(heads)}")
    first = rows["the demo's model"][0]
    blind = [first["blind/all"], None, *(first[f"blind/{kind}"] for kind in kinds), None]
    print(f"| blind | {' | '.join('' if one is None else f'{100 * one:.1f}' for one in blind)} |")
    for method, found in rows.items():
        cells = [Figure(*mean_and_interval([one[column] for one in found])).text for column in columns]
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
