"""Plots of the report as inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from diptych import figures
from diptych_eval.gallery import Point

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899", "#84cc16", "#64748b")


@dataclass(frozen=True)
class Series:
    """One named line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def curve(title: str, series: Sequence[Series], *, x_label: str, from_zero: bool = False) -> str:
    """Lines over samples or steps, as an SVG element."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for line, colour in zip(series, COLOURS, strict=False):
            axes.plot(line.x, line.y, color=colour, linewidth=1.6, label=line.name)
        axes.set_xlabel(x_label)
        axes.set_title(title, fontsize=11, loc="left")
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=9)
        return figures.svg(figure, title)


def embedding_map(dataset: str, points: Sequence[Point]) -> str:
    """Pictures and their texts in one plane, coloured by group."""
    kinds = []
    for number, group in enumerate(sorted({point.group for point in points})):
        colour = COLOURS[number % len(COLOURS)]
        some = [point for point in points if point.group == group]
        kinds.append(Points(group or "pictures", np.array([point.image for point in some]), colour, "o"))
        kinds.append(Points("", np.array([point.text for point in some]), colour, "x"))
    return scatter_map(f"{dataset}: pictures (dots) and their texts (crosses)", kinds)


def scatter_map(title: str, points: Sequence["Points"]) -> str:
    """Kinds of points in the plane; circles are pictures, crosses are texts."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(7.2, 5.0), layout="constrained")
        axes = figure.add_subplot()
        for kind in points:
            axes.scatter(
                kind.xy[:, 0],
                kind.xy[:, 1],
                s=16 if kind.marker == "o" else 22,
                marker=kind.marker,
                color=kind.colour,
                alpha=0.75,
                linewidths=0 if kind.marker == "o" else 1.0,
                label=kind.name,
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(title, fontsize=11, loc="left")
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figures.svg(figure, title)


@dataclass(frozen=True)
class Points:
    """Points of one kind."""

    name: str
    xy: np.ndarray
    """[N, 2]"""
    colour: str
    marker: str
    """`o` or `x`."""
