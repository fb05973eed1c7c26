"""Plots as inline SVG that follows the page: text and axes take the page's colour, in light and dark."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib.figure import Figure

# Replaced by `currentColor` in the finished SVG; a colour that nothing else uses.
_INK = "#010203"
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899", "#84cc16", "#64748b")
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diptych",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": _INK,
}


@dataclass(frozen=True)
class Series:
    """One named line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def curve(title: str, series: Sequence[Series], *, x_label: str, from_zero: bool = False) -> str:
    """Lines over samples or steps, as an SVG element."""
    with matplotlib.rc_context(_STYLE):
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
        return _svg(figure, title)


def scatter_map(title: str, points: Sequence["Points"]) -> str:
    """Kinds of points in the plane; circles are pictures, crosses are texts."""
    with matplotlib.rc_context(_STYLE):
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
        return _svg(figure, title)


@dataclass(frozen=True)
class Points:
    """Points of one kind."""

    name: str
    xy: np.ndarray
    """[N, 2]"""
    colour: str
    marker: str
    """`o` or `x`."""


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    element = text[text.index("<svg") :]
    element = re.sub(r'^<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", element, count=1, flags=re.DOTALL)
    element = re.sub(
        r'^<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", element, count=1, flags=re.DOTALL
    )
    label = title.replace("&", "and").replace('"', "").replace("<", "")
    return element.replace(_INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
