"""Evaluation folders with results that are made up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diptych_eval import items, metrics, result
from diptych_eval.result import Result
from diptych_eval.tasks.family import Items


@dataclass(frozen=True)
class Made:
    """One result: figures, and the columns of its one table."""

    task: str
    dataset: str
    figures: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)
    keys: Sequence[str] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)
    clusters: Sequence[str] = ()


def write(folder: Path, *made: Made) -> Path:
    """results.json and items/; columns become metrics of their names, with intervals."""
    results = []
    for one in made:
        columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in one.columns.items()}
        size = len(one.keys) or max((len(values) for values in columns.values()), default=10)
        keys = tuple(one.keys) or tuple(f"k{i}" for i in range(size))
        found = Result(
            one.task,
            one.dataset,
            {**{name: float(values.mean()) for name, values in columns.items()}, **one.figures},
            size,
            {name: metrics.bootstrap_interval(values) for name, values in columns.items()},
            dict(one.protocol),
            fingerprint="f" * 8,
            model=f"weights of {folder.name}",
            versions={"diptych": "0.1.0"},
        )
        if columns:
            items.write(folder / "items", found, (Items("pictures", keys, columns, tuple(one.clusters)),))
        results.append(found)
    result.write(folder / "results.json", results)
    return folder
