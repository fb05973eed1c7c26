"""`diptych data index`, `stats`, `check`, `view`: tools that look at shards and change none of them."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli.arguments import add_overwrite, add_verb, configured
from diptych.cli.outcome import BAD_INPUT, OK, Outcome, table

if TYPE_CHECKING:
    from diptych_data.counting import Distribution
    from diptych_data.stats import Stats

_SHARDS = "folder of shards, glob, or brace pattern such as 'shards/{000000..000099}.tar'"


def add(tools: Any) -> None:
    """Declares the verbs."""
    _add_index(tools)
    _add_stats(tools)
    _add_check(tools)
    _add_view(tools)


def _add_tool(tools: Any, name: str, call: Any, help: str, *, example: str) -> Any:
    tool = add_verb(tools, name, call, help, example=example)
    tool.add_argument("shards", metavar="SHARDS", help=_SHARDS)
    tool.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one for each core)")
    return tool


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return number


# --- index -------------------------------------------------------------------------------------------------------


def _add_index(tools: Any) -> None:
    index = _add_tool(
        tools,
        "index",
        _index,
        "write the sidecar index of every shard that has none or a stale one; interrupted, it goes on",
        example="diptych data index shards/train",
    )
    index.add_argument("--check", action="store_true", help="write nothing; exit code 2 where one is missing or stale")
    add_overwrite(index, "an index")


def _index(options: argparse.Namespace) -> Outcome:
    from diptych_data.index import check_indexes, write_indexes

    if options.check:
        summary = check_indexes(options.shards, workers=options.workers)
    else:
        summary = write_indexes(options.shards, overwrite=options.overwrite, workers=options.workers)
    wrong = [(shard, f"not an intact tar file: {fault}") for shard, fault in summary.damaged]
    if options.check:
        wrong += [(shard, "no index") for shard in summary.missing]
        wrong += [(shard, "stale index") for shard in summary.stale]
    text = f"shards: {summary.shards:,}  fresh: {summary.fresh:,}  written: {summary.written:,}"
    if wrong:
        text += "\n" + table("wants attention", ["shard", "what"], wrong)
    return Outcome(asdict(summary), text, BAD_INPUT if wrong else OK)


# --- stats -------------------------------------------------------------------------------------------------------


def _add_stats(tools: Any) -> None:
    stats = _add_tool(
        tools,
        "stats",
        _stats,
        "count what is in shards: pictures, captions, scripts, repetitions, unusable samples",
        example="diptych data stats shards/train --out stats",
    )
    stats.add_argument("--out", type=Path, metavar="FOLDER", help="write stats.json and stats.html there")
    stats.add_argument("--sample", type=_positive, metavar="N", help="look at N samples drawn at random (default: all)")
    stats.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    stats.add_argument("--tokens", action="store_true", help="count tokens of CLIP's tokenizer too (slower)")


def _stats(options: argparse.Namespace) -> Outcome:
    from diptych_data.stats import StatsOptions, stats

    found = stats(
        StatsOptions(options.shards, options.out, options.sample, options.seed, options.workers),
        make_tokenizer=_clip_tokenizer if options.tokens else None,
    )
    text = _stats_text(found)
    if options.out is not None:
        text += f"\n\nreport: {options.out / 'stats.html'}"
    return Outcome(asdict(found), text)


def _clip_tokenizer() -> Any:
    """CLIP's own, with room for long captions: their length is what is asked for."""
    from diptych.models.towers.open_clip import build_tokenizer

    return build_tokenizer({"context_length": 1024})


def _stats_text(stats: "Stats") -> str:
    part = f" of {stats.total_samples:,}" if stats.samples < stats.total_samples else ""
    parts = [
        table(
            "set",
            ["", ""],
            [
                ("shards", stats.shards),
                ("samples", f"{stats.samples:,}{part}"),
                ("bytes of the shards", stats.shard_bytes),
                ("members", _shares({name: row["count"] for name, row in stats.members.items()})),
                ("formats", _shares(stats.formats)),
                ("modes", _shares(stats.modes)),
                ("pictures that are exact copies", stats.repeated_pictures),
                ("unusable", _shares(stats.unusable) or "none"),
            ],
        ),
        _distributions(stats),
        _columns(stats),
    ]
    if stats.most_repeated_captions:
        rows = [(row.example, row.times, row.column) for row in stats.most_repeated_captions[:5]]
        parts.append(table("most repeated captions", ["caption", "times", "column"], rows))
    return "\n\n".join(parts)


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _distributions(stats: "Stats") -> str:
    named: list[tuple[str, Distribution | None]] = [
        ("width", stats.width),
        ("height", stats.height),
        ("aspect (width / height)", stats.aspect),
        ("megapixels", stats.megapixels),
        ("captions per sample", stats.captions_per_sample),
    ]
    for name, column in stats.columns.items():
        named += [(f"{name}: characters", column.chars), (f"{name}: words", column.words)]
        named += [(f"{name}: tokens", column.tokens)]
    rows = [(name, d.mean, d.min, d.p5, d.median, d.p95, d.max) for name, d in named if d is not None]
    return table("distributions", ["", "mean", "min", "5%", "median", "95%", "max"], rows)


def _columns(stats: "Stats") -> str:
    rows = [
        (name, column.samples, column.captions, column.repeated, _shares(column.captions_by_script))
        for name, column in stats.columns.items()
    ]
    return table("captions", ["column", "samples", "captions", "repeated", "by script"], rows)


# --- check -------------------------------------------------------------------------------------------------------


def _add_check(tools: Any) -> None:
    check = _add_tool(
        tools,
        "check",
        _check,
        "look for what is wrong with shards: exit code 0 where nothing is, 2 where something is",
        example="diptych data check shards/train",
    )
    check.add_argument("--fast", action="store_true", help="look at the pictures' headers alone")
    check.add_argument(
        "--max-caption-chars", type=_positive, default=10_000, metavar="N", help="longer is wrong (default: 10000)"
    )


def _check(options: argparse.Namespace) -> Outcome:
    from diptych_data.check import CheckOptions, check

    found = check(CheckOptions(options.shards, options.fast, options.max_caption_chars, options.workers))
    text = f"{found.samples:,} samples in {found.shards:,} shards: "
    if found.is_clean:
        return Outcome(asdict(found), text + "nothing wrong")
    rows = [
        (reason, problem.count, "\n".join(f"{shard} ({count:,})" for shard, count in problem.worst_shards))
        for reason, problem in found.problems.items()
    ]
    examples = [
        (reason, place.replace("\n", " ")) for reason, problem in found.problems.items() for place in problem.examples
    ]
    tables = [
        table("problems", ["reason", "count", "worst shards"], rows),
        table("examples", ["reason", "shard and key"], examples),
    ]
    total = sum(problem.count for problem in found.problems.values())
    return Outcome(asdict(found), "\n\n".join([f"{text}{total:,} problems", *tables]), BAD_INPUT)


# --- view --------------------------------------------------------------------------------------------------------


def _add_view(tools: Any) -> None:
    view = _add_tool(
        tools,
        "view",
        _view,
        "draw random samples with all their captions as one HTML file",
        example="diptych data view shards/train --out sheet.html --count 100",
    )
    view.add_argument("--out", type=Path, default=Path("sheet.html"), metavar="FILE", help="(default: sheet.html)")
    view.add_argument("--count", type=_positive, default=100, metavar="N", help="samples (default: 100)")
    view.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    view.add_argument("--side", type=_positive, default=256, help="longer side of the pictures (default: 256)")


def _view(options: argparse.Namespace) -> dict[str, Any]:
    from diptych_data.view import ViewOptions, view

    names = ("shards", "out", "count", "seed", "side", "workers")
    given = {name: getattr(options, name) for name in names} | {"out": str(options.out)}
    return asdict(view(configured(ViewOptions, given, [], where="diptych data view")))
