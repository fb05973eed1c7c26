"""Figures of several models as tables: what is in each cell, which is best, which differ from the first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diptych_eval.compare import Comparison, Difference
from diptych_eval.folders import Evaluated
from diptych_eval.headline import best, direction, headlines, is_share, written
from diptych_eval.report.bars import Bar, Chart, chart
from diptych_eval.result import Result

LEVEL = 0.05


@dataclass(frozen=True)
class Cell:
    """One figure."""

    text: str
    interval: str = ""
    is_best: bool = False
    mark: str = ""
    """How it differs from the first's: ▲ better, ▼ worse, ≠ where nobody can say; empty where it may be chance."""
    why: str = ""
    """The p-value behind the mark."""


@dataclass(frozen=True)
class Row:
    """One metric of all models, or all metrics of one model."""

    label: str
    detail: str
    cells: tuple[Cell, ...]
    model: int | None = None
    """Whose figures these are; None where each cell is another model's."""


@dataclass(frozen=True)
class Column:
    """Of a table with a row for each model and set."""

    name: str
    metric: str
    group: str = ""


@dataclass(frozen=True)
class Figures:
    """All results of the models, and their comparison."""

    models: tuple[Evaluated, ...]
    comparison: Comparison

    def pairs(self, wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
        """Task and set of everything that was measured of any model, of some tasks."""
        every = dict.fromkeys((one.task, one.dataset) for model in self.models for one in model.results)
        return [pair for pair in every if wanted(pair[0])]

    def of(self, task: str, dataset: str) -> list[Result | None]:
        """The result of each model."""
        return [model.find(task, dataset) for model in self.models]

    def cells(self, task: str, dataset: str, metric: str) -> tuple[Cell, ...]:
        """A metric of each model."""
        found = self.of(task, dataset)
        values = [None if one is None else one.metrics.get(metric) for one in found]
        top = best(task, metric, values)
        apart = self._differences(task, dataset, metric)
        return tuple(
            Cell("–")
            if one is None or value is None
            else Cell(
                written(task, metric, value),
                _interval(one, metric),
                value == top,
                *_mark(task, metric, difference),
            )
            for one, value, difference in zip(found, values, apart, strict=True)
        )

    def _differences(self, task: str, dataset: str, metric: str) -> list[Difference | None]:
        """Of each model to the first."""
        for some in self.comparison.sets:
            for one in some.metrics:
                if (some.task, some.dataset, one.name) == (task, dataset, metric):
                    return [None, *one.differences]
        return [None] * len(self.models)

    def metrics(self, task: str, dataset: str) -> list[str]:
        """The names of all metrics."""
        return list(dict.fromkeys(name for one in self.of(task, dataset) if one is not None for name in one.metrics))

    def by_metric(self, task: str, dataset: str) -> tuple[Row, ...]:
        """A row for each metric, a column for each model."""
        return tuple(Row(name, "", self.cells(task, dataset, name)) for name in self.metrics(task, dataset))

    def by_model(self, task: str, dataset: str, columns: Sequence[Column]) -> tuple[Row, ...]:
        """A row for each model, a column for each of some metrics."""
        cells = [self.cells(task, dataset, column.metric) for column in columns]
        return tuple(
            Row(self.models[number].name, "", tuple(cell[number] for cell in cells), number)
            for number, one in enumerate(self.of(task, dataset))
            if one is not None
        )

    def headlines(self) -> tuple[Row, ...]:
        """The metrics that stand for each task and set."""
        return tuple(
            Row(dataset, f"{task} {metric}", self.cells(task, dataset, metric))
            for task, dataset, metric in self._headline_metrics()
        )

    def headline_chart(self) -> Chart:
        """The same as bars."""
        rows = [
            (dataset, f"{task} {metric}", self._bars(task, dataset, metric))
            for task, dataset, metric in self._headline_metrics()
            if is_share(task, metric)
        ]
        return chart(rows)

    def _headline_metrics(self) -> list[tuple[str, str, str]]:
        found = [(one, metric) for model in self.models for one in model.results for metric in headlines(one)]
        return list(dict.fromkeys((one.task, one.dataset, metric) for one, metric in found))

    def bars(self, task: str, dataset: str, named: Sequence[tuple[str, str]]) -> Chart:
        """Metrics of one task, each under a name of its own."""
        return chart([(name, "", self._bars(task, dataset, metric)) for metric, name in named])

    def _bars(self, task: str, dataset: str, metric: str) -> list[Bar]:
        return [
            Bar(number, one.metrics[metric], one.intervals.get(metric), written(task, metric, one.metrics[metric]))
            for number, one in enumerate(self.of(task, dataset))
            if one is not None and metric in one.metrics
        ]


def _interval(one: Result, metric: str) -> str:
    if metric not in one.intervals:
        return ""
    low, high = one.intervals[metric]
    if is_share(one.task, metric):
        return f"[{100 * low:.1f}, {100 * high:.1f}]"
    return f"[{written(one.task, metric, low)}, {written(one.task, metric, high)}]"


def _mark(task: str, metric: str, apart: Difference | None) -> tuple[str, str]:
    if apart is None or apart.p_holm is None or apart.p_holm >= LEVEL:
        return "", ""
    way = direction(task, metric) * apart.value
    mark = "≠" if way == 0 else "▲" if way > 0 else "▼"
    return mark, f"p = {apart.p_holm:.2g} after Holm's correction"
