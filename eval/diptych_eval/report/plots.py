"""Plots of the report as inline SVG. Titles and legends belong to the page: it sets them in its own size, and escapes
them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from diptych import figures
from diptych_eval.gallery import Point

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899", "#84cc16", "#64748b")


@dataclass(frozen=True)
class Series:
    """One line."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str
    bounds: Sequence[tuple[float, float]] = ()
    """Interval of each y, drawn as a band; none: no band."""
    sizes: Sequence[float] = field(default=())
    """Area of each mark, a share of the largest; none: a line without marks."""


def curve(title: str, series: Sequence[Series], *, from_zero: bool = False) -> str:
    """Lines over samples seen."""
    with _drawing(title, (4.6, 2.5)) as drawing:
        for line in series:
            drawing.axes.plot(line.x, line.y, color=line.colour, linewidth=1.6)
        drawing.axes.set_xlabel("samples seen")
        if from_zero:
            drawing.axes.set_ylim(bottom=0)
        drawing.axes.xaxis.set_major_formatter(EngFormatter())
    return drawing.svg


def shares(title: str, series: Sequence[Series], *, x_label: str, doubling: bool = False) -> str:
    """Lines of shares over a few whole numbers, with bands; `doubling` where each is twice the one before."""
    with _drawing(title, (4.6, 2.8)) as drawing:
        axes = drawing.axes
        for line in series:
            axes.plot(line.x, line.y, color=line.colour, linewidth=1.6, marker="o", markersize=4)
            if line.bounds:
                low, high = zip(*line.bounds, strict=True)
                axes.fill_between(line.x, low, high, color=line.colour, alpha=0.15, linewidth=0)
        if doubling:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for line in series for x in line.x})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g}%"))
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
    return drawing.svg


def reliability(title: str, series: Sequence[Series]) -> str:
    """How often a model is right that is this sure; on the diagonal it knows what it knows."""
    with _drawing(title, (4.0, 3.4)) as drawing:
        axes = drawing.axes
        axes.plot([0, 1], [0, 1], color=matplotlib.rcParams["text.color"], alpha=0.35, linewidth=1, linestyle="--")
        for line in series:
            axes.plot(line.x, line.y, color=line.colour, linewidth=1.2, alpha=0.35)
            axes.scatter(line.x, line.y, s=[8 + 72 * size for size in line.sizes], color=line.colour, linewidths=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("confidence")
        axes.set_ylabel("right")
    return drawing.svg


def embedding_map(title: str, points: Sequence[Point], colours: dict[str, str]) -> str:
    """Pictures (dots) and their texts (crosses) in one plane, in the colours of their groups."""
    with _drawing(title, (4.6, 3.6)) as drawing:
        for group, colour in colours.items():
            some = [point for point in points if point.group == group]
            if not some:
                continue
            images, texts = (np.array([getattr(point, side) for point in some]) for side in ("image", "text"))
            drawing.axes.scatter(images[:, 0], images[:, 1], s=14, color=colour, alpha=0.75, linewidths=0)
            drawing.axes.scatter(texts[:, 0], texts[:, 1], s=20, marker="x", color=colour, alpha=0.75, linewidths=1)
        drawing.axes.set_axis_off()  # the directions have no unit, and no name
    return drawing.svg


class _Drawing:
    """A figure with one pair of axes; its SVG when it is finished."""

    def __init__(self, size: tuple[float, float]) -> None:
        self.figure = Figure(figsize=size, layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.svg = ""


@contextmanager
def _drawing(title: str, size: tuple[float, float]) -> Iterator[_Drawing]:
    with matplotlib.rc_context(figures.STYLE):
        drawing = _Drawing(size)
        yield drawing
        drawing.svg = figures.svg(drawing.figure, title)
