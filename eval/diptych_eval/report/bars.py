"""Bars that the page draws itself: they keep their size of type on a phone, which an SVG with labels does not."""

from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Bar:
    """A share of one model."""

    model: int
    value: float
    interval: tuple[float, float] | None
    text: str


@dataclass(frozen=True)
class Lane:
    """A bar in percents of the chart's width."""

    model: int
    width: float
    whisker: tuple[float, float] | None
    """Where it begins, and how wide it is."""
    text: str


@dataclass(frozen=True)
class BarRow:
    """What several models got for one thing."""

    label: str
    detail: str
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Chart:
    """Rows over one axis from 0."""

    rows: tuple[BarRow, ...]
    ticks: tuple[str, ...]
    """At equal distances from its beginning to its end."""


def chart(rows: Sequence[tuple[str, str, Sequence[Bar]]]) -> Chart:
    """Brings label, detail and bars of each row to one scale; rows without bars are left out."""
    kept = [(label, detail, [bar for bar in bars if bar.value == bar.value]) for label, detail, bars in rows]
    kept = [row for row in kept if row[2]]
    largest = max((max(bar.value, *(bar.interval or (0,))) for _, _, bars in kept for bar in bars), default=0.0)
    end = next((step for step in _STEPS if step >= largest), 1.0)
    ticks = tuple(f"{100 * end * part:g}%" for part in (0, 0.5, 1))
    return Chart(tuple(BarRow(label, detail, _lanes(bars, end)) for label, detail, bars in kept), ticks)


def _lanes(bars: Sequence[Bar], end: float) -> tuple[Lane, ...]:
    def percent(value: float) -> float:
        return round(100 * min(1.0, max(0.0, value / end)), 2)

    return tuple(
        Lane(
            bar.model,
            percent(bar.value),
            None if bar.interval is None else (percent(bar.interval[0]), percent(bar.interval[1] - bar.interval[0])),
            bar.text,
        )
        for bar in bars
    )
