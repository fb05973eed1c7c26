"""What hard captions teach the demo's model, and what it forgets over them.

python benchmarks/composition.py

Needs `make demo`. Writes negatives for the training set and, by another seed, for an artist that training never saw;
tunes plainly, as NegCLIP and as DeGLA, equally long; prints Markdown: accuracy on the artist's negatives by kind, that
of a classifier that sees no picture, and zero-shot accuracy on the artist.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

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
SEEDS = (0, 1, 2)
METHODS = {
    "plain": ("configs/tune/negclip.yaml", ["objective.contrastive.candidates=[]", "data.captions.hard=null"]),
    "NegCLIP": ("configs/tune/negclip.yaml", []),
    "DeGLA": ("configs/tune/composition.yaml", []),
}
FEWEST = 100
"""Examples of a kind that has a row of its own."""


def prepare(work: Path) -> None:
    """Negatives and the blind test of those that are measured."""
    for source, name, seed in (("demo/shards/train", "train", 0), (f"{ARTIST}/test", "test", 1)):
        if not (work / name / "negatives.json").is_file():
            _diptych(
                "data",
                "negatives",
                source,
                str(work / name),
                "columns=[name]",
                f"seed={seed}",
                "without=drop",
                "--overwrite",
            )
    (work / "blind.json").write_text(_diptych("data", "blind", str(work / "test"), "--json"), encoding="utf-8")


def _diptych(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "diptych", *words], check=True, capture_output=True, text=True).stdout


def tuned(work: Path, method: str, seed: int, changes: list[str]) -> str:
    """The run, trained unless it is there."""
    config, own = METHODS[method]
    settings = [f"run={work / method}-{seed}", f"seed={seed}", f"data.shards={work / 'train'}", *own, *changes]
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
    parser.add_argument("--work", type=Path, default=Path("runs/composition"), help="folder of sets and runs")
    parser.add_argument("changes", nargs="*", help="settings of all runs, such as total_samples=20000")
    options = parser.parse_args()
    work: Path = options.work
    prepare(work)
    rows = {"the demo's model": [measure(work, BASE)]}
    for method in METHODS:
        rows[method] = [measure(work, tuned(work, method, seed, options.changes)) for seed in SEEDS]
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
