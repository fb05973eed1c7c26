"""Models against the first of them, metric by metric, on the items that all were asked.

Rows of the tables of items are matched by key. A metric with a column of its name is the mean of that column, so its
difference gets an interval and a p-value (`diptych_eval.paired`), in which rows of one cluster count as one; of others
there is the difference alone. Where models were asked different items, the common ones count, and figures that need all
items are not compared.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

import diptych_eval.suite  # noqa: F401  # makes all tasks known, and so their settings
from diptych.runfolder import differences as changes
from diptych_eval import items, paired
from diptych_eval.folders import Evaluated
from diptych_eval.result import Result
from diptych_eval.tasks.family import Items, Task

_CHANGES = 3


@dataclass(frozen=True)
class Difference:
    """A model minus the first."""

    value: float
    interval: tuple[float, float] | None = None
    """95%, paired bootstrap over items."""
    p: float | None = None
    """Paired sign-flip test."""
    p_holm: float | None = None
    """The same, corrected for all p-values of the comparison."""


@dataclass(frozen=True)
class Metric:
    """One figure of each model."""

    name: str
    values: tuple[float, ...]
    differences: tuple[Difference | None, ...]
    """Of each model but the first; None where the figures are of different items."""
    num_rows: int
    """Items that were matched; 0 where the metric is no mean over items."""


@dataclass(frozen=True)
class SetComparison:
    """One task on one set."""

    task: str
    dataset: str
    metrics: tuple[Metric, ...]
    notes: tuple[str, ...]
    """What differs beside the models."""


@dataclass(frozen=True)
class Comparison:
    """Models side by side."""

    models: tuple[str, ...]
    sets: tuple[SetComparison, ...]
    notes: tuple[str, ...]
    """What could not be compared."""


def compare(models: Sequence[Evaluated]) -> Comparison:
    """Everything that was measured of all models; its `sets` are empty where nothing was."""
    sets: list[SetComparison] = []
    notes: list[str] = []
    for task, dataset in dict.fromkeys((one.task, one.dataset) for model in models for one in model.results):
        found = [one for model in models if (one := model.find(task, dataset)) is not None]
        if len(found) < len(models):
            absent = ", ".join(model.name for model in models if model.find(task, dataset) is None)
            notes.append(f"{task} {dataset}: not measured of {absent}")
        elif compared := _compare_set(models, found):
            sets.append(compared)
        else:
            notes.append(f"{task} {dataset}: no item was asked of all models, so their figures are of different things")
    return Comparison(tuple(model.name for model in models), _corrected(sets), tuple(notes))


def _compare_set(models: Sequence[Evaluated], found: list[Result]) -> SetComparison | None:
    """None where no item was asked of all models."""
    tables = [items.read(model.folder / "items", one) for model, one in zip(models, found, strict=True)]
    kinds = [one.kind for one in tables[0] if all(one.kind in [other.kind for other in some] for some in tables)]
    matched = [_Matched.of([next(one for one in some if one.kind == kind) for some in tables]) for kind in kinds]
    if matched and not any(one.num_rows for one in matched):
        return None
    notes = [
        f"protocol of {model.name}: {difference}"
        for model, one in zip(models[1:], found[1:], strict=True)
        if (difference := _protocol_difference(found[0], one))
    ]
    notes += [one.note for one in matched if one.note]
    if not matched:
        notes.append("no tables of the items of all models: differences without intervals")
    is_whole = not any(one.note for one in matched) and len({one.num_items for one in found}) == 1
    names = [name for name in found[0].metrics if all(name in one.metrics for one in found)]
    metrics = tuple(_metric(name, found, matched, is_whole=is_whole) for name in names)
    return SetComparison(found[0].task, found[0].dataset, metrics, tuple(notes))


@dataclass(frozen=True)
class _Matched:
    """The rows that one table has in common among models, in the first's order."""

    num_rows: int
    columns: tuple[dict[str, Float[Tensor, " N"]], ...]
    """Of each model."""
    clusters: Int[Tensor, " N"] | None
    """Of rows that are not independent."""
    note: str
    """Empty where all models have the same rows."""

    @classmethod
    def of(cls, tables: Sequence[Items]) -> "_Matched":
        places = [_places(table.keys) for table in tables]
        common = [key for key in places[0] if all(key in some for some in places[1:])]
        rows = [torch.tensor([some[key] for key in common], dtype=torch.long) for some in places]
        columns = tuple(
            {name: values[chosen] for name, values in table.columns.items()}
            for table, chosen in zip(tables, rows, strict=True)
        )
        first = tables[0]
        clusters = tuple(first.clusters[row] for row in rows[0].tolist()) if first.clusters else ()
        numbers = replace(first, clusters=clusters).cluster_numbers
        sizes = [len(some) for some in places]
        note = ""
        if any(size > len(common) for size in sizes):
            of_each = ", ".join(f"{size:,}" for size in sizes)
            note = f"{first.kind}: {len(common):,} in common of {of_each}; figures are of those in common"
        return cls(len(common), columns, numbers, note)


def _places(keys: Sequence[str]) -> dict[tuple[str, int], int]:
    """Where each key stands, its first, second, … occurrence apart: equal captions are rows of their own."""
    seen: Counter[str] = Counter()
    places = {}
    for place, key in enumerate(keys):
        places[key, seen[key]] = place
        seen[key] += 1
    return places


def _metric(name: str, found: Sequence[Result], matched: Sequence[_Matched], *, is_whole: bool) -> Metric:
    table = next((one for one in matched if all(name in columns for columns in one.columns)), None)
    if table is None or not table.num_rows:
        values = tuple(one.metrics[name] for one in found)
        apart = tuple(Difference(value - values[0]) if is_whole else None for value in values[1:])
        return Metric(name, values, apart, 0)
    columns = [some[name].double() for some in table.columns]
    means = tuple(float(column.mean()) for column in columns)
    differences = tuple(
        Difference(float(apart.mean()), paired.interval(apart, table.clusters), paired.p_value(apart, table.clusters))
        for apart in (column - columns[0] for column in columns[1:])
    )
    return Metric(name, means, differences, table.num_rows)


def _protocol_difference(first: Result, other: Result) -> str:
    """What a task was told, and how much it was given; what it found of the model is no protocol."""
    settings = {*first.protocol, *other.protocol}
    if first.task in Task.members:
        settings = {one.name for one in fields(Task.named(first.task))}
    before, after = (
        {name: value for name, value in one.protocol.items() if name in settings or name.startswith("num_")}
        for one in (first, other)
    )
    found = [f"{change.key} {change.after!r} instead of {change.before!r}" for change in changes(before, after)]
    more = f" and {len(found) - _CHANGES} more" if len(found) > _CHANGES else ""
    return "; ".join(found[:_CHANGES]) + more


def _corrected(sets: Sequence[SetComparison]) -> tuple[SetComparison, ...]:
    """With Holm's correction over all p-values."""
    given = [
        one.p
        for some in sets
        for metric in some.metrics
        for one in metric.differences
        if one is not None and one.p is not None
    ]
    corrected = iter(paired.holm(given))

    def correct(metric: Metric) -> Metric:
        apart = tuple(
            one if one is None or one.p is None else replace(one, p_holm=next(corrected)) for one in metric.differences
        )
        return replace(metric, differences=apart)

    return tuple(replace(some, metrics=tuple(correct(metric) for metric in some.metrics)) for some in sets)
