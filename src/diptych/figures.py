"""Figures as inline SVG that follows the page: text and axes take the page's colour, in light and dark."""

import io
import re
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure

# Replaced by `currentColor` in the finished SVG; a colour that nothing else uses.
_INK = "#010203"
STYLE: Any = {
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
"""For `matplotlib.rc_context`, around the drawing and `svg`."""


def svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element without size of its own, labelled for those who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    opening, rest = text[text.index("<svg") :].split(">", 1)
    opening = re.sub(r'\s(?:width|height)="[^"]*"', "", opening)  # the page decides; the viewBox keeps the shape
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, count=1, flags=re.DOTALL)
    label = re.sub(r'[&"<>]', "", title)
    return f'{opening} role="img" aria-label="{label}">{rest}'.replace(_INK, "currentColor")
