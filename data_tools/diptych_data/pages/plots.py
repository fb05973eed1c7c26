"""Bars as inline SVG."""

from collections.abc import Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from diptych import figures

_BLUE = "#3b82f6"
_STYLE = figures.STYLE | {"axes.grid.axis": "y", "axes.axisbelow": True}


def histogram(title: str, bins: np.ndarray, counts: np.ndarray, *, scale: str = "linear") -> str:
    """Bars over the edges `bins`, as an SVG element; `scale` is `linear` or `log`."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(bins[:-1], counts, np.diff(bins), align="edge", color=_BLUE, linewidth=0)
        axes.set_xscale(scale)
        axes.set_xlim(bins[0], bins[-1])
        if scale == "log":  # a label in every part of a decade: pictures seldom span one
            axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.xaxis.set_major_formatter(_short)
        return _finished(figure, title)


def shares(title: str, names: Sequence[str], values: Sequence[float]) -> str:
    """One bar for each name, as an SVG element. The names must not come from data."""
    with matplotlib.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(len(names)), values, color=_BLUE, linewidth=0, height=0.7)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(max(len(names), 4) - 0.4, -0.6)
        return _finished(figure, title, y_counts=False)


def _short(value: float, _: object) -> str:
    """`0.5`, `640`, `2k`, `1.5M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _finished(figure: Figure, title: str, *, y_counts: bool = True) -> str:
    axes = figure.axes[0]
    axes.set_title(title, fontsize=11, loc="left")
    (axes.yaxis if y_counts else axes.xaxis).set_major_formatter(_short)
    return figures.svg(figure, title)
