"""The comparison as a page: means over seeds with intervals, and curves over the number of pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import cycle
from pathlib import Path

import jinja2
from markupsafe import Markup

from diptych import __version__
from diptych.runfolder import write_text
from diptych_eval.protocols.baselines import mean_and_interval
from diptych_eval.protocols.fewshot import Measured
from diptych_eval.protocols.plan import BASELINES, OWN_FIGURES, SHARE
from diptych_eval.report.plots import COLOURS, Series, shares


@dataclass(frozen=True)
class Figure:
    """A mean over seeds."""

    mean: float
    half: float
    """Of its 95% interval; NaN where there is one seed."""
    gained: float | None = None
    """Beyond zero-shot, on a set that was not learned from; below 0: forgotten. Zero-shot does not vary: the
    interval is that of the mean."""

    @property
    def text(self) -> str:
        """In percent."""
        interval = f" ± {100 * self.half:.1f}" if self.half == self.half else ""
        gained = f" ({100 * self.gained:+.1f})" if self.gained is not None else ""
        return f"{100 * self.mean:.1f}{interval}{gained}"


@dataclass(frozen=True)
class Row:
    """One method, and its figure for each number of shots."""

    method: str
    colour: str
    figures: tuple[Figure | None, ...]
    is_best: tuple[bool, ...]


@dataclass(frozen=True)
class Table:
    """One figure of all methods."""

    name: str
    shots: tuple[int, ...]
    rows: tuple[Row, ...]

    def markdown(self) -> str:
        """For a terminal and for documents."""
        head = [self.name, *(f"{shots} shots" if shots > 1 else "1 shot" for shots in self.shots)]
        rows = [[row.method, *(one.text if one is not None else "" for one in row.figures)] for row in self.rows]
        lines = [head, ["---", *["--:"] * len(self.shots)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(measured: Sequence[Measured]) -> list[Table]:
    """One for each figure, of the methods that have it; what learns from nothing is the same in all columns."""
    names = list(dict.fromkeys(name for one in measured for name in one.figures))
    colours = dict(zip(dict.fromkeys(one.cell.method for one in measured), cycle(COLOURS), strict=False))
    return [_table(name, colours, measured) for name in names]


def _table(name: str, colours: Mapping[str, str], measured: Sequence[Measured]) -> Table:
    shots = tuple(sorted({one.cell.shots for one in measured} - {0}))
    having = {one.cell.method for one in measured if name in one.figures}
    base = next((one.figures.get(name) for one in measured if one.cell.method == BASELINES[0]), None)

    def figure(method: str, count: int) -> Figure | None:
        values = [
            one.figures[name]
            for one in measured
            if one.cell.method == method and one.cell.shots in (0, count) and name in one.figures
        ]
        if not values:
            return None
        mean, half = mean_and_interval(values)
        compared = base is not None and name not in OWN_FIGURES and method != BASELINES[0]
        return Figure(mean, half, mean - base if compared and base is not None else None)

    rows = {method: [figure(method, count) for count in shots] for method in colours if method in having}
    best = [
        max((one.mean for one in column if one is not None), default=0.0) for column in zip(*rows.values(), strict=True)
    ]
    return Table(
        {"top1": "top-1"}.get(name, name.replace("_", " ")),
        shots,
        tuple(
            Row(
                method,
                colours[method],
                tuple(figures),
                tuple(
                    name != SHARE and one is not None and one.mean == top
                    for one, top in zip(figures, best, strict=True)
                ),
            )
            for method, figures in rows.items()
        ),
    )


def write_page(measured: Sequence[Measured], title: str, out: Path) -> None:
    """Writes the page: one file that needs nothing but itself."""
    shown = tables(measured)
    package = resources.files("diptych_eval")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(package.joinpath("protocols/fewshot.html.j2").read_text(encoding="utf-8"))
    style = Markup(package.joinpath("report/report.css").read_text(encoding="utf-8"))
    plots = [Markup(_curves(table)) for table in shown]
    seeds = len({one.cell.seed for one in measured if one.cell.shots})
    write_text(
        out,
        template.render(
            title=title,
            parts=list(zip(shown, plots, strict=True)),
            style=style,
            seeds=seeds,
            compares=any(one.gained is not None for table in shown for row in table.rows for one in row.figures if one),
            version=__version__,
        ),
    )


def _curves(table: Table) -> str:
    lines = []
    for row in table.rows:
        known = [(shots, one) for shots, one in zip(table.shots, row.figures, strict=True) if one is not None]
        bounds = [(one.mean - one.half, one.mean + one.half) for _, one in known]
        lines.append(
            Series(
                [shots for shots, _ in known],
                [one.mean for _, one in known],
                row.colour,
                bounds if all(low == low for low, _ in bounds) else (),
            )
        )
    return shares(table.name, lines, x_label="pictures of each class", doubling=True)
