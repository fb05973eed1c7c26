"""From words to a verb to an exit code. The groups of verbs beside this file wire the packages together, lazily."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from diptych import log as logs
from diptych.cli import bench, caption, checkpoint, data, evaluate, export, results, train, tuning, words
from diptych.cli.outcome import BAD_INPUT, START_AGAIN, Outcome
from diptych.errors import DiptychError, Interrupted
from diptych.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0 done, 2 bad input (one line on stderr), 75 start it
    again to go on, traceback for a bug."""
    options = parse(arguments)
    logs.setup(quiet=options.quiet, rank=int(os.environ.get("RANK", "0")))
    try:
        result = options.verb(options)
    except Interrupted as request:
        print(f"diptych: {request}", file=sys.stderr)
        return START_AGAIN
    except DiptychError as error:
        print(f"diptych: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("diptych: interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    outcome = result if isinstance(result, Outcome) else Outcome(result or {})
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            _show(outcome, as_json=options.json)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has read enough; without this Python complains once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return outcome.code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; settings may stand before, between and behind flags, which argparse alone does not allow."""
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:2] == ["eval", "compare"]:  # a verb of its own: `eval` takes a model where `compare` stands
        words[:2] = ["eval compare"]
    options, rest = parser.parse_known_args(words)
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and not hasattr(options, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        options.settings = [*options.settings, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diptych",
        description="Pretrain, fine-tune and evaluate CLIP-style vision-language models.",
        epilog="example: diptych train configs/pretrain/emoji.yaml total_samples=20000",
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for group in (train, tuning, evaluate, caption, words, results, export, checkpoint, data, bench):
        group.add(verbs)
    return parser


def _show(outcome: Outcome, *, as_json: bool) -> None:
    if as_json and outcome.values:
        print(json.dumps(outcome.values, ensure_ascii=False))
    elif outcome.text:
        print(outcome.text)
    else:
        for name, value in outcome.values.items():
            print(f"{name}: {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_readable(inner)}" for name, inner in value.items()) or "none"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
