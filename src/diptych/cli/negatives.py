"""`diptych data negatives`, `blind`: tools that write false captions, and test whether their texts give them away."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli.arguments import add_overwrite, add_settings, add_verb, configured
from diptych.cli.outcome import Outcome, table

if TYPE_CHECKING:
    from diptych_data.negatives.guesser import Accuracy
    from diptych_data.negatives.make import Blind


def add(tools: Any) -> None:
    """Declares the verbs."""
    negatives = add_verb(
        tools,
        "negatives",
        _negatives,
        "write false captions, parts and paraphrases beside the true ones as new shards; interrupted, it goes on",
        example="diptych data negatives shards/train shards/hard per_picture=4",
        keys="diptych_data.negatives.options:NegativesOptions",
    )
    negatives.add_argument("shards", metavar="SHARDS", help="folder of shards, glob, or brace pattern")
    negatives.add_argument("out", type=Path, metavar="OUT", help="folder for the new shards")
    add_settings(negatives, "What is written, as key=value pairs; every key is listed below.")
    add_overwrite(negatives, "a folder of shards")
    blind = add_verb(
        tools,
        "blind",
        _blind,
        "test how far false captions are told from true ones without the picture; 0.5: not at all",
        example="diptych data blind shards/hard",
        keys="diptych_data.blind:BlindOptions",
    )
    blind.add_argument("shards", metavar="SHARDS", help="folder of shards, glob, or brace pattern")
    add_settings(blind, "What is tested, as key=value pairs; every key is listed below.")


def _negatives(options: argparse.Namespace) -> Outcome:
    from diptych_data.negatives.make import negatives
    from diptych_data.negatives.options import NegativesOptions

    given = {"shards": options.shards, "out": str(options.out), "overwrite": options.overwrite}
    summary = negatives(configured(NegativesOptions, given, options.settings, where="diptych data negatives"))
    usable = summary.samples + summary.skipped.get("no_negative", 0)
    text = f"{summary.negatives:,} negatives for {usable - summary.without:,} of {usable:,} samples"
    text += f" in {summary.shards:,} shards: {summary.out}"
    added = [f"{name} {count:,}" for name, count in summary.positives.items() if count]
    added += [f"counter-images {summary.images:,}"] if summary.images else []
    text += f"\nadded too: {', '.join(added)}" if added else ""
    if summary.blind is not None:
        text += "\n" + _before_and_after(summary.blind, summary.kinds)
    else:
        text += "\n" + table("negatives", ["kind", "written"], summary.kinds.items())
    if summary.dropped:
        text += "\n" + table("proposals let go", ["reason", "number"], summary.dropped.items())
    return Outcome(asdict(summary), text)


def _before_and_after(found: "Blind", kinds: Mapping[str, int]) -> str:
    rows = [
        (kind, kinds.get(kind, "" if kind == "all" else 0), _interval(one), _interval(found.after.get(kind)))
        for kind, one in found.before.items()
    ]
    return table("blind accuracy, 0.5 is best", ["kind", "written", "before", "after"], rows)


def _interval(one: "Accuracy | None") -> str:
    return "" if one is None else f"{one.value:.3f} [{one.low:.2f}, {one.high:.2f}]"


def _blind(options: argparse.Namespace) -> Outcome:
    from diptych_data.blind import BlindOptions, blind

    wanted = configured(BlindOptions, {"shards": options.shards}, options.settings, where="diptych data blind")
    found = blind(wanted)
    rows = [(kind, one.pairs, one.captions, _interval(one)) for kind, one in found.kinds.items()]
    text = f"{found.pairs:,} pairs of {found.samples:,} samples\n"
    return Outcome(asdict(found), text + table("blind accuracy", ["kind", "pairs", "captions", "accuracy"], rows))
