"""What `diptych bench eval` prints: seconds of each side, and the figures that both report."""

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from diptych.bench.machine import processor

OURS, FLOOR = "ours", "floor"
PEERS = ("clip-benchmark, zero-shot", "clip-benchmark, retrieval")
BOTH = "clip-benchmark"


@dataclass(frozen=True)
class Row:
    """One implementation, over all rounds."""

    implementation: str
    seconds: float = 0.0
    """Median."""
    spread: tuple[float, float] = (0.0, 0.0)
    """Least and most."""
    cpu_seconds: float = 0.0
    """Of all its processes and threads, median: what it costs a machine that others use as well."""
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    rows: tuple[Row, ...]
    figures: dict[str, dict[str, float]]
    """Side (ours, clip-benchmark) → our names of what both report."""
    sizes: dict[str, int]
    """pictures, prompts, captions."""
    model: str
    batch: int
    precision: str
    versions: dict[str, str]
    """The peer's packages; ours where it is left out."""

    @property
    def difference(self) -> float | None:
        """The largest between figures that both sides have; None where there is none."""
        ours, theirs = self.figures[OURS], self.figures[BOTH]
        apart = [abs(ours[name] - theirs[name]) for name in ours if name in theirs]
        return max((value for value in apart if not math.isnan(value)), default=None)


def table(report: Report) -> str:
    """Seconds and figures as Markdown, with hardware and versions above."""
    by_name = {row.implementation: row for row in report.rows}
    lines = [
        *_header(report),
        "",
        "| | seconds, median (least, most) | clip-benchmark's / these | floor / these | CPU s |",
    ]
    lines.append("|---|--:|--:|--:|--:|")
    for row in report.rows:
        if row.problem:
            lines.append(f"| {row.implementation} | {row.problem} | | | |")
            continue
        seconds = f"{row.seconds:.1f} ({row.spread[0]:.1f}, {row.spread[1]:.1f})"
        peer, floor = (_ratio(by_name.get(name), row) for name in (BOTH, FLOOR))
        lines.append(f"| {row.implementation} | {seconds} | {peer} | {floor} | {row.cpu_seconds:.1f} |")
    return "\n".join(lines + _figures(report))


def _ratio(whose: Row | None, row: Row) -> str:
    """Of one part of the peer's work to both nothing is said."""
    if whose is None or whose.problem or not row.seconds or row.implementation in PEERS:
        return ""
    return f"{whose.seconds / row.seconds:.2f}"


def _header(report: Report) -> list[str]:
    sizes = ", ".join(f"{count:,} {what}" for what, count in report.sizes.items())
    versions = ", ".join(f"{package} {number}" for package, number in report.versions.items())
    asked = f"{report.model}, {report.precision}, batches of {report.batch}"
    return [f"{processor()}, {os.cpu_count()} cores; {asked}; {sizes}", versions]


def _figures(report: Report) -> list[str]:
    ours, theirs = report.figures[OURS], report.figures[BOTH]
    if report.difference is None:
        return []
    rows = [
        f"| {name} | {ours[name]:.6f} | {theirs[name]:.6f} | {abs(ours[name] - theirs[name]):.1e} |"
        for name in ours
        if name in theirs
    ]
    return ["", "| | ours | clip-benchmark | difference |", "|---|--:|--:|--:|", *rows]


def as_json(report: Report) -> dict[str, Any]:
    """Plain values."""
    return asdict(report) | {"largest_difference": report.difference}
