"""All tasks of an evaluation over one model: each set embedded once, finished tasks not repeated."""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from diptych import __version__
from diptych import log as logs
from diptych.config import Config, discover, to_tree
from diptych.distributed.runtime import Ranks
from diptych.errors import DataError
from diptych_eval import exhibits, items, metrics, result
from diptych_eval.embedder import Embedder, EmbedSettings
from diptych_eval.encoder import Encoder
from diptych_eval.result import Result
from diptych_eval.store import FeatureStore
from diptych_eval.tasks.family import Outcome, Task

log = logging.getLogger(__name__)
discover("diptych_eval.tasks")
for plugin in entry_points(group="diptych.tasks"):
    plugin.load()


@dataclass(frozen=True)
class EvalConfig(Config):
    """What is measured."""

    tasks: tuple[Task, ...]
    """Protocols with their sets."""
    embed: EmbedSettings = field(default_factory=EmbedSettings)
    """How features are made."""
    cache: Path | None = None
    """Folder in which features are kept, for all models and runs; none: `features` beside the results."""

    def __post_init__(self) -> None:
        names = [(task.choice_name, task.dataset) for task in self.tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{sorted(twice)[0]} occurs twice among the tasks; give each its own dataset name")


def evaluate(
    encoder: Encoder,
    config: EvalConfig,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> list[Result]:
    """Runs every task that `out/results.json` does not already hold for this very model, data and protocol.

    Args:
        out: folder for results.json, tables of items and what the report draws; None: nothing is written.
        overwrite: run everything again.
        ranks: those that share the work, each of which must call; None: this process alone.

    Raises:
        DataError: sets of some tasks cannot be used: says which, after all the others are done and kept.
    """
    ranks = ranks or Ranks(0, 1)
    store = FeatureStore(config.cache or out / "features", afresh=overwrite) if out is not None else None
    embedder = Embedder(encoder, config.embed, ranks=ranks, store=store)
    before = [] if out is None or overwrite else result.read(out / "results.json")
    known = {done.fingerprint: done for done in before}
    wanted = {(task.choice_name, task.dataset) for task in config.tasks}
    others = [r for r in before if r.model == embedder.fingerprint and (r.task, r.dataset) not in wanted]
    results: list[Result] = []
    failed: list[str] = []
    with logs.progress("evaluating", len(config.tasks), quiet=not ranks.is_main) as bar:
        for task in config.tasks:
            try:
                results.append(_result(embedder, task, known, out))
            except DataError as error:
                log.warning("%s %s: %s", task.choice_name, task.dataset, error)
                failed.append(str(error))
            if out is not None and ranks.is_main:
                result.write(out / "results.json", others + results)
            bar.advance(status=task.dataset)
    if failed:
        more = f" (and {len(failed) - 1} other tasks failed, see above)" if len(failed) > 1 else ""
        raise DataError(failed[0] + more)
    return results


def _result(embedder: Embedder, task: Task, known: dict[str, Result], out: Path | None) -> Result:
    """From an earlier call, or made now."""
    fingerprint = _fingerprint(embedder, task)
    if fingerprint in known:
        return known[fingerprint]
    outcome = task.run(embedder)
    headline = " ".join(f"{name}={value:.4f}" for name, value in outcome.metrics.items())
    log.info("%s %s n=%d %s", task.choice_name, task.dataset, outcome.num_items, headline)
    found = Result(
        task=task.choice_name,
        dataset=task.dataset,
        metrics=outcome.metrics,
        num_items=outcome.num_items,
        intervals=_intervals(outcome),
        protocol=to_tree(task) | outcome.notes,
        fingerprint=fingerprint,
        model=embedder.fingerprint,
        versions={"diptych": __version__, "torch": torch.__version__},
    )
    if out is not None and embedder.ranks.is_main:
        items.write(out / "items", found, outcome.items)
        exhibits.write(out / "exhibits", found, outcome)
    return found


def _intervals(outcome: Outcome) -> dict[str, tuple[float, float]]:
    of_means = {
        name: metrics.bootstrap_interval(values, table.cluster_numbers)
        for table in outcome.items
        for name, values in table.columns.items()
        if name in outcome.metrics
    }
    return of_means | outcome.intervals


def _fingerprint(embedder: Embedder, task: Task) -> str:
    parts: list[Any] = [embedder.fingerprint, to_tree(task), embedder.digest(task.files()), __version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
