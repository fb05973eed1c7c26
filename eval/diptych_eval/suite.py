"""All tasks of an evaluation over one model, each set embedded once, finished tasks not repeated."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diptych import __version__
from diptych import log as logs
from diptych.config import Config, discover, to_tree
from diptych_eval import artifacts, result
from diptych_eval.embed import EmbeddedSplit, embed
from diptych_eval.encoder import Encoder
from diptych_eval.result import Result
from diptych_eval.tasks.family import Task

log = logging.getLogger(__name__)
discover("diptych_eval.tasks")


@dataclass(frozen=True)
class EvalConfig(Config):
    """What is measured."""

    tasks: tuple[Task, ...]
    """Protocols with their sets."""
    batch_size: int = 256
    """Pictures per forward pass."""

    def __post_init__(self) -> None:
        names = [(task.choice_name, task.dataset) for task in self.tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{sorted(twice)[0]} occurs twice among the tasks; give each its own dataset name")


def evaluate(encoder: Encoder, config: EvalConfig, *, out: Path | None = None, overwrite: bool = False) -> list[Result]:
    """Runs every task that `out/results.json` does not already hold for this very model and protocol.

    Args:
        out: folder for results.json and what the report draws from; None: nothing is written.
        overwrite: run everything again.

    Raises:
        DataError: a set cannot be used; what was finished before it is kept.
    """
    known = {} if out is None or overwrite else {done.fingerprint: done for done in result.read(out / "results.json")}
    embedded: dict[str, EmbeddedSplit] = {}
    results: list[Result] = []
    with logs.progress("evaluating", len(config.tasks)) as bar:
        for task in config.tasks:
            fingerprint = _fingerprint(encoder, task)
            if fingerprint in known:
                results.append(known[fingerprint])
            else:
                if task.shards() not in embedded:
                    embedded[task.shards()] = embed(encoder, task.shards(), batch_size=config.batch_size)
                found = _run(task, encoder, embedded[task.shards()], out)
                results.append(replace(found, fingerprint=fingerprint))
            if out is not None:
                result.write(out / "results.json", results)
            bar.advance(status=task.dataset)
    return results


def _run(task: Task, encoder: Encoder, split: EmbeddedSplit, out: Path | None) -> Result:
    outcome = task.run(encoder, split)
    if out is not None:
        artifacts.write(out / "artifacts", task, split, outcome)
    headline = " ".join(f"{name}={value:.4f}" for name, value in outcome.metrics.items())
    log.info("%s %s n=%d %s", task.choice_name, task.dataset, outcome.num_items, headline)
    return Result(
        task=task.choice_name,
        dataset=task.dataset,
        metrics=outcome.metrics,
        num_items=outcome.num_items,
        intervals=outcome.intervals,
        protocol=to_tree(task) | {"num_candidates": len(outcome.texts)},
        versions={"diptych": __version__, "torch": torch.__version__},
    )


def _fingerprint(encoder: Encoder, task: Task) -> str:
    text = json.dumps([encoder.fingerprint, to_tree(task), __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
