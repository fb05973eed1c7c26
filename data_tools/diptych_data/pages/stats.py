"""stats.html: the counts of `diptych_data.stats` as tiles, plots and tables."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from diptych_data.counting import histogram
from diptych_data.pages import plots
from diptych_data.pages.render import render
from diptych_data.stats import Stats
from diptych_data.tally import Tally

_BINS = 40


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    value: str
    label: str
    bad: bool = False


def page(shards: str, stats: Stats, total: Tally) -> str:
    """The whole page."""
    has_tokens = any(column.tokens for column in stats.columns.values())
    part = "" if stats.samples >= stats.total_samples else f", drawn from {stats.total_samples:,}"
    return render(
        "stats.html.j2",
        {
            "title": shards,
            "subtitle": f"what is in {stats.shards:,} shards: {stats.samples:,} samples{part}",
            "stats": stats,
            "tiles": _tiles(stats),
            "picture_plots": [Markup(svg) for svg in _picture_plots(total)],
            "caption_plots": [Markup(svg) for svg in _caption_plots(total)],
            "has_tokens": has_tokens,
        },
    )


def _tiles(stats: Stats) -> list[Tile]:
    captions = sum(column.captions for column in stats.columns.values())
    unusable = sum(stats.unusable.values())
    return [
        Tile(f"{stats.samples:,}", "samples"),
        Tile(f"{stats.shards:,}", "shards"),
        Tile(human_bytes(stats.shard_bytes), "in all shards"),
        Tile(f"{captions:,}", f"captions in {len(stats.columns)} columns"),
        Tile(f"{stats.repeated_pictures:,}", "pictures that are exact copies"),
        Tile(f"{unusable:,}", "samples that training passes over", bad=unusable > 0),
    ]


def human_bytes(number: float) -> str:
    """`14.3 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"


def _picture_plots(total: Tally) -> list[str]:
    drawn = [
        _over_octaves("Width, pixels", total.widths),
        _over_octaves("Height, pixels", total.heights),
        _over_octaves("Aspect, width / height", total.aspects),
        _over_octaves("Megapixels", total.megapixels),
        _shares("Formats, %", total.formats),
        _shares("Modes, %", total.modes),
    ]
    return [svg for svg in drawn if svg]


def _over_octaves(title: str, counts: Counter[float]) -> str:
    """Bars of equal width on a logarithmic axis; zeros, if any, fall into the first."""
    positive = [value for value in counts if value > 0]
    if not positive:
        return ""
    low, high = min(positive), max(positive)
    bins = np.geomspace(low / 1.05, high * 1.05, _BINS) if high / low > 1.5 else np.geomspace(low / 2, high * 2, _BINS)
    return plots.histogram(title, bins, histogram(counts, bins), scale="log")


def _caption_plots(total: Tally) -> list[str]:
    columns = list(total.columns.values())
    drawn = [
        _counted("Characters per caption", sum((column.chars for column in columns), Counter())),
        _counted("Words per caption", sum((column.words for column in columns), Counter())),
        _counted("Tokens per caption", sum((column.tokens for column in columns), Counter())),
        _counted("Captions per sample", total.captions),
        _shares("Letters by script, %", sum((column.letters for column in columns), Counter())),
    ]
    return [svg for svg in drawn if svg]


def _shares(title: str, counts: Counter[str]) -> str:
    """The eight most frequent."""
    whole = sum(counts.values())
    shown = counts.most_common(8)
    return plots.shares(title, [name for name, _ in shown], [100 * n / whole for _, n in shown]) if whole else ""


def _counted(title: str, counts: Counter[int]) -> str:
    """Bars of whole numbers from 0 to where 99.5% lie; the last bar holds the rest."""
    if not counts:
        return ""
    top, seen, whole = 0, 0, sum(counts.values())
    for value in sorted(counts):
        top, seen = value, seen + counts[value]
        if seen >= 0.995 * whole:
            break
    step = max(1, -(-(top + 1) // _BINS))
    bins = np.arange(0, top + 2 * step, step) - 0.5 * (step == 1)
    rest = " (last bar: and more)" if seen < whole else ""
    return plots.histogram(title + rest, bins, histogram(counts, bins))
