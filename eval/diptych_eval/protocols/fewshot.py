"""Methods that learn from few pictures, side by side: each drawn, tuned and measured alike, several times.

OUT/
  cells.jsonl           one line per measurement: method, shots, seed, what it depends on, figures
  shards/K-SEED/        the pictures that were learned from
  held_out/K-SEED/      those that a share was chosen on
  runs/METHOD/K-SEED-…/ the runs, by what they depend on; a finished measurement needs its run no longer
  features/             of the base, by content
  fewshot.html          tables and curves
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diptych import __version__
from diptych import log as logs
from diptych.config import from_tree, to_tree
from diptych.encoder import ModelEncoder
from diptych.errors import ConfigError, DataError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.interpolate import interpolate
from diptych.models.merge import merged
from diptych.models.run import open_run
from diptych.runfolder import RunFolder, write_text
from diptych.train.loop import train
from diptych_eval.embedder import Embedder
from diptych_eval.labelled import Labelled
from diptych_eval.pictures import ShardPictures
from diptych_eval.protocols import baselines, between
from diptych_eval.protocols.plan import BASELINES, CHOSEN, SHARE, Cell, FewShotPlan, Method
from diptych_eval.protocols.shots import Part, draw, hold_out, write
from diptych_eval.store import FeatureStore
from diptych_eval.tasks.zeroshot import against_classes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One cell with its figures."""

    cell: Cell
    figures: dict[str, float]
    """`top1`, or `base`, `new` and `harmonic_mean`; `NAME` of each other set; and `tuned_share` where it was chosen."""


@dataclass(frozen=True)
class _Test:
    """Pictures that are measured among some classes."""

    name: str
    part: Part
    first: int
    last: int

    @property
    def labelled(self) -> Labelled:
        return self.part.of_classes(self.first, self.last)


def run(plan: FewShotPlan) -> list[Measured]:
    """All cells of the plan, those that are there already as they are.

    Raises:
        DataError: a set cannot be used, or a class has fewer pictures than shots.
        ConfigError: a method's keys make no run.
    """
    comparison = _Comparison(plan)
    done = comparison.read()
    cells = list(comparison.cells())
    with logs.progress("few shots", len(cells)) as bar:
        for cell in cells:
            if cell not in done:
                done[cell] = comparison.measure(cell)
                comparison.keep(cell, done[cell])
            bar.advance(status=f"{cell.method} {cell.shots}")
    return [Measured(cell, done[cell]) for cell in cells]


class _Comparison:
    """The base, its features of all sets, and what is known already."""

    def __init__(self, plan: FewShotPlan) -> None:
        self._plan = plan
        self._methods = {method.name: method for method in plan.methods}
        self._towers = plan.recipe.get("model", {}).get("towers")
        if self._towers is None:
            raise ConfigError("no base · recipe.model.towers · name a run, a folder or published weights")
        self._base = ModelEncoder(self._build())
        embedder = Embedder(self._base, plan.embed, store=FeatureStore(plan.out / "features"))
        self._train = Part.open(embedder, plan.root, "train", plan.classes, plan.templates)
        self._tests = list(self._open_tests(embedder))
        count = len(self._train.set.names)
        self._learned = -(-count // 2) if plan.split == "base_to_new" else count
        measured = [
            [t.name, t.part.content, t.part.set.names, t.part.set.templates, t.first, t.last] for t in self._tests
        ]
        self._sets = [self._train.content, self._train.set.templates, self._learned, measured]
        draw(self._train.of_classes(0, self._learned), max(plan.shots), 0)  # told now, not after an hour
        self._val: Part | None = None
        if any(method.tuned_share == CHOSEN for method in plan.methods):
            if (Path(plan.root) / "val").is_dir():
                self._val = self._open(embedder, "val")
            self._held_out(max(plan.shots), 0)

    def _build(self) -> DualEncoder:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return dual_encoder.build(from_tree(ModelConfig, {"towers": self._towers}, where="recipe.model"), seed=0).to(
            device
        )

    def _open_tests(self, embedder: Embedder) -> Iterator[_Test]:
        plan = self._plan
        test = self._open(embedder, "test")
        count = len(test.set.names)
        if plan.split == "base_to_new":
            half = -(-count // 2)
            yield _Test("base", test, 0, half)
            yield _Test("new", test, half, count)
        else:
            yield _Test("top1", test, 0, count)
        for other in plan.others:
            part = Part.open(embedder, other.root, "test", None, plan.templates)
            yield _Test(other.name, part, 0, len(part.set.names))

    def _open(self, embedder: Embedder, split: str) -> Part:
        """A part of the set beside `train`. Raises DataError where it is of other classes."""
        plan = self._plan
        part = Part.open(embedder, plan.root, split, plan.classes, plan.templates)
        if part.set.names != self._train.set.names:
            raise DataError(
                f"train and {split} are of different classes · {plan.root} · give both the same, or `classes`"
            )
        return part

    def _held_out(self, shots: int, seed: int) -> tuple[Part, Labelled]:
        """What a share is chosen on: some pictures of a part. Raises DataError where there are none."""
        part, behind = (self._val, 0) if self._val is not None else (self._train, shots)
        pictures = part.of_classes(0, self._learned)
        return part, pictures.rows(hold_out(pictures, shots, seed, behind=behind))

    # --- which cells ---------------------------------------------------------------------------------------------

    def cells(self) -> Iterator[Cell]:
        """Zero-shot once, everything else for each number of shots and each seed."""
        yield Cell(BASELINES[0], 0, 0)
        for shots in self._plan.shots:
            for method in (*BASELINES[1:], *self._methods):
                yield from (Cell(method, shots, seed) for seed in self._plan.seeds)

    @property
    def _file(self) -> Path:
        return self._plan.out / "cells.jsonl"

    def read(self) -> dict[Cell, dict[str, float]]:
        """What was measured before, with the same base, sets and settings."""
        if not self._file.is_file():
            return {}
        found = {}
        for line in self._file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            cell = Cell(row["method"], row["shots"], row["seed"])
            if row["of"] == self._mark(cell):
                found[cell] = row["figures"]
        return found

    def keep(self, cell: Cell, figures: dict[str, float]) -> None:
        """Adds a line; a half-written one of an earlier call is no line."""
        before = self._file.read_text(encoding="utf-8") if self._file.is_file() else ""
        line = json.dumps(asdict(cell) | {"of": self._mark(cell), "figures": figures})
        write_text(self._file, f"{before}{line}\n")

    def _mark(self, cell: Cell) -> str:
        """What a cell's figures depend on."""
        plan, method = self._plan, self._methods.get(cell.method)
        own = [to_tree(method), plan.recipe, plan.epochs] if method is not None else []
        if method is not None and method.tuned_share == CHOSEN and self._val is not None:
            own.append(self._val.content)
        parts = json.dumps([self._base.fingerprint, own, self._sets, __version__], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    # --- one cell ------------------------------------------------------------------------------------------------

    def measure(self, cell: Cell) -> dict[str, float]:
        """Draws, tunes and measures."""
        method = self._methods.get(cell.method)
        if method is not None:
            encoder, chosen = self._tuned(method, cell)
            return self._figures(encoder) | chosen
        if not cell.shots:
            return self._figures(self._base)
        train = self._train.of_classes(0, self._learned)
        drawn = train.rows(draw(train, cell.shots, cell.seed))
        scores = {}
        for test in self._tests:
            knows = test.part.set.names[test.first : test.last] == drawn.classes
            scores[test.name] = self._baseline(cell, drawn, test) if knows else self._zero_shot(self._base, test)
        return self._harmonised(
            {test.name: baselines.top1(scores[test.name], test.labelled.labels) for test in self._tests}
        )

    def _baseline(self, cell: Cell, drawn: Labelled, test: _Test) -> Float[Tensor, "N C"]:
        _, probe, tip_adapter, _ = BASELINES
        if cell.method == probe:
            return baselines.linear_probe(drawn, test.labelled)
        _, classes = against_classes(self._embedder(self._base), test.part.found, drawn.classes, self._templates(test))
        cache = baselines.Cache(drawn, classes, self._base.logit_scale)
        chosen = cache.chosen()
        if cell.method != tip_adapter:
            cache = cache.trained(*chosen, seed=cell.seed)
        return cache.scores(test.labelled.features, *chosen)

    def _tuned(self, method: Method, cell: Cell) -> tuple[ModelEncoder, dict[str, float]]:
        """Trains, opens the run, and removes it once its weights are read. The model, and a share that was chosen."""
        train_part = self._train.of_classes(0, self._learned)
        drawn = train_part.rows(draw(train_part, cell.shots, cell.seed))
        shards = write(self._train, drawn, self._plan.out / "shards" / f"{cell.shots}-{cell.seed}")
        name = f"{cell.shots}-{cell.seed}-{self._mark(cell)}"  # what an earlier plan left is no beginning of this one
        folder = self._plan.out / "runs" / method.name.replace("/", "_") / name
        done = train(self._plan.recipe_of(method, drawn.classes, cell, shards, folder))
        model = open_run(RunFolder(done.root))
        model, chosen = model.to(self._base.model.logit_scale.device), {}
        if method.tuned_share is not None:
            model, share = merged(model), method.tuned_share
            if not isinstance(share, float):
                share = chosen[SHARE] = self._chosen_share(model, cell)
            model = interpolate(self._build(), model, share)
        shutil.rmtree(done.checkpoints)
        return ModelEncoder(model), chosen

    def _chosen_share(self, tuned: DualEncoder, cell: Cell) -> float:
        part, held = self._held_out(cell.shots, cell.seed)
        pictures = ShardPictures(str(write(part, held, self._plan.out / "held_out" / f"{cell.shots}-{cell.seed}")))

        def figure(encoder: ModelEncoder) -> float:
            embedder = self._embedder(encoder)
            seen, classes = against_classes(embedder, embedder.pictures(pictures), held.classes, part.set.templates)
            return baselines.top1(seen.features @ classes.T, held.labels)

        return between.best(between.sweep(self._build(), tuned, figure))

    def _figures(self, encoder: ModelEncoder) -> dict[str, float]:
        found = {}
        for test in self._tests:
            found[test.name] = baselines.top1(self._zero_shot(encoder, test), test.labelled.labels)
        return self._harmonised(found)

    def _harmonised(self, found: dict[str, float]) -> dict[str, float]:
        if self._plan.split == "base_to_new":
            found["harmonic_mean"] = baselines.harmonic_mean(found["base"], found["new"])
        return found

    def _zero_shot(self, encoder: ModelEncoder, test: _Test) -> Float[Tensor, "N C"]:
        """By the model's own prompts of classes where it has some that read these, else by templates."""
        embedder = self._embedder(encoder)
        seen = embedder.pictures(test.part.set.pictures)
        rows = ((test.part.labels >= test.first) & (test.part.labels < test.last)).nonzero()[:, 0]
        names = test.part.set.names[test.first : test.last]
        pictures, classes = against_classes(embedder, seen, names, self._templates(test))
        return pictures.features[rows] @ classes.T

    def _embedder(self, encoder: ModelEncoder) -> Embedder:
        store = FeatureStore(self._plan.out / "features") if encoder is self._base else None
        return Embedder(encoder, self._plan.embed, store=store)

    @staticmethod
    def _templates(test: _Test) -> tuple[str, ...]:
        return test.part.set.templates
