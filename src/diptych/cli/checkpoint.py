"""`diptych checkpoint`: what is in a run's checkpoints, whether it is intact, how two differ."""

import argparse
from pathlib import Path
from typing import Any

from diptych.cli.arguments import add_verb
from diptych.cli.outcome import BAD_INPUT, OK, Outcome, table


def add(verbs: Any) -> None:
    """Declares the verbs."""
    group = verbs.add_parser("checkpoint", help="look into checkpoints", description="Look into checkpoints.")
    tools = group.add_subparsers(metavar="TOOL", required=True)
    listing = add_verb(tools, "ls", _list, "list a run's checkpoints", example="diptych checkpoint ls runs/first")
    listing.add_argument("run", type=Path, metavar="RUN", help="run folder")
    verify = add_verb(
        tools,
        "verify",
        _verify,
        "compare every file with its checksum: exit code 0 where all are intact, 2 where one is not",
        example="diptych checkpoint verify runs/first",
    )
    verify.add_argument("run", type=Path, metavar="RUN", help="run folder, or one checkpoint")
    diff = add_verb(
        tools,
        "diff",
        _diff,
        "show what differs between two checkpoints",
        example="diptych checkpoint diff runs/first runs/second",
    )
    diff.add_argument("one", type=Path, metavar="A", help="checkpoint, or run folder (its newest)")
    diff.add_argument("two", type=Path, metavar="B", help="checkpoint, or run folder (its newest)")


def _list(options: argparse.Namespace) -> Outcome:
    from diptych import checkpoint

    found = [checkpoint.summary(path) for path in checkpoint.all_of(options.run)]
    rows = [(one.name, one.samples_seen, one.bytes, ", ".join(one.parts)) for one in found]
    text = table(str(options.run), ("checkpoint", "samples seen", "bytes", "parts"), rows)
    return Outcome({"checkpoints": [vars(one) for one in found]}, text)


def _verify(options: argparse.Namespace) -> Outcome:
    from diptych import checkpoint

    found = {path.name: checkpoint.verify(path) for path in checkpoint.all_of(options.run)}
    rows = [(name, "; ".join(problems) or "intact") for name, problems in found.items()]
    code = BAD_INPUT if any(found.values()) else OK
    return Outcome({"problems": found}, table(str(options.run), ("checkpoint", ""), rows), code)


def _diff(options: argparse.Namespace) -> Outcome:
    from diptych import checkpoint

    pair = [checkpoint.all_of(path)[-1] for path in (options.one, options.two)]
    found = checkpoint.differences(*pair)
    title = f"{pair[0]} and {pair[1]}"
    if not found:
        return Outcome({"differences": []}, f"{title}: the same")
    head = ("part", "name", "what differs")
    return Outcome({"differences": found}, table(title, head, [(d["part"], d["name"], d["what"]) for d in found]))
