"""`diptych data subset`, `merge`, `filter`, `dedup`: tools that choose samples and write them as new shards."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diptych.cli.arguments import add_overwrite, add_settings, add_verb, configured
from diptych.cli.outcome import Outcome, table

_SETTINGS = "What is chosen, as key=value pairs; every key is listed below."


def add(tools: Any) -> None:
    """Declares the verbs."""
    _add_tool(
        tools,
        "subset",
        _subset,
        "write some of the samples as new shards",
        example="diptych data subset shards/train shards/small count=10000 seed=1",
    )
    _add_merge(tools)
    _add_tool(
        tools,
        "filter",
        _filter,
        "write the samples that meet rules on picture, caption, CLIP score, caption credibility",
        example="diptych data filter shards/train shards/good min_side=64 min_words=2 max_aspect=3",
    )
    dedup = _add_tool(
        tools,
        "dedup",
        _dedup,
        "write shards without near-duplicate pictures; of each kind the largest stays",
        example="diptych data dedup shards/train shards/distinct radius=4",
    )
    dedup.add_argument("--dry-run", action="store_true", help="look and count; write nothing")


def _add_tool(tools: Any, name: str, call: Any, help: str, *, example: str) -> Any:
    tool = add_verb(tools, name, call, help, example=example, keys=_OPTIONS[name])
    tool.add_argument("shards", metavar="SHARDS", help="folder of shards, glob, or brace pattern")
    tool.add_argument("out", type=Path, metavar="OUT", help="folder for the new shards")
    add_settings(tool, _SETTINGS)
    add_overwrite(tool, "a folder of shards")
    return tool


_OPTIONS = {
    "subset": "diptych_data.subset:SubsetOptions",
    "merge": "diptych_data.subset:MergeOptions",
    "filter": "diptych_data.filter:FilterOptions",
    "dedup": "diptych_data.dedup:DedupOptions",
}


def _add_merge(tools: Any) -> None:
    merge = add_verb(
        tools,
        "merge",
        _merge,
        "write several sets of shards as one; keys that occur twice are made unique",
        example="diptych data merge shards/a shards/b shards/both samples_per_shard=5000",
        keys=_OPTIONS["merge"],
    )
    merge.add_argument("folders", nargs="+", metavar="SHARDS … OUT", help="sets of shards, and the folder to write")
    merge.set_defaults(settings=[])  # those that stand behind a flag arrive here, the others among the folders
    add_overwrite(merge, "a folder of shards")


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {"shards": options.shards, "out": str(options.out), "overwrite": options.overwrite}


def _subset(options: argparse.Namespace) -> dict[str, Any]:
    from diptych_data.subset import SubsetOptions, subset

    return asdict(subset(configured(SubsetOptions, _given(options), options.settings, where="diptych data subset")))


def _merge(options: argparse.Namespace) -> dict[str, Any]:
    from diptych.errors import ConfigError
    from diptych_data.subset import MergeOptions, merge

    *sources, out = [word for word in options.folders if "=" not in word] or [""]
    if not sources:
        raise ConfigError("merge needs at least one set of shards and a folder to write · diptych data merge A B OUT")
    settings = [*(word for word in options.folders if "=" in word), *options.settings]
    given = {"sources": sources, "out": out, "overwrite": options.overwrite}
    return asdict(merge(configured(MergeOptions, given, settings, where="diptych data merge")))


def _filter(options: argparse.Namespace) -> Outcome:
    from diptych_data.filter import FilterOptions, filter_shards

    wanted = configured(FilterOptions, _given(options), options.settings, where="diptych data filter")
    summary = filter_shards(wanted, load=_load)
    rows = [(rule, count) for rule, count in summary.dropped.items()]
    text = f"kept {summary.kept:,} of {summary.samples:,} samples in {summary.shards:,} shards: {summary.out}"
    if rows:
        text += "\n" + table("let go by", ["rule or reason", "samples"], rows)
    return Outcome(asdict(summary), text)


def _dedup(options: argparse.Namespace) -> Outcome:
    from diptych_data.dedup import DedupOptions, dedup

    given = _given(options) | {"dry_run": options.dry_run}
    wanted = configured(DedupOptions, given, options.settings, where="diptych data dedup")
    summary = dedup(wanted, load=_load)
    where = "nothing was written" if wanted.dry_run else f"{summary.shards:,} shards: {summary.out}"
    text = f"{summary.duplicates:,} duplicates among {summary.samples:,} samples, {summary.kept:,} stay; {where}"
    if summary.unusable:
        text += "\nunusable, not written: " + ", ".join(f"{name} {n:,}" for name, n in summary.unusable.items())
    if summary.examples:
        rows = [(one.kept, one.dropped, one.by, one.distance) for one in summary.examples[:10]]
        text += "\n" + table("examples", ["stays", "goes", "by", "distance"], rows)
    return Outcome(asdict(summary), text)


def _load(model: str) -> Any:
    """Any model that `diptych eval` takes; filter and dedup know nothing of the evaluation package."""
    from diptych.encoder import load

    return load(model)
