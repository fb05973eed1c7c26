"""`diptych words`: which words learned prompts have come to lie near."""

import argparse
from dataclasses import asdict
from typing import Any

from diptych.cli.arguments import MODEL_HELP, add_verb
from diptych.cli.outcome import Outcome, table


def add(verbs: Any) -> None:
    """Declares the verb."""
    words = add_verb(
        verbs,
        "words",
        _words,
        "list the nearest words of each vector that a model's prompts learned",
        example="diptych words runs/context --count 3",
    )
    words.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    words.add_argument("--count", type=int, default=5, metavar="N", help="words of each vector (default: 5)")


def _words(options: argparse.Namespace) -> Outcome:
    from diptych.encoder import load
    from diptych.models.prompts.words import nearest

    found = nearest(load(options.model).model, options.count)
    rows = [
        (one.name, one.place, one.norm, ", ".join(f"{word} ({cosine:.2f})" for word, cosine in one.words))
        for one in found
    ]
    text = table("learned vectors", ["of", "place", "norm", "nearest words (cosine)"], rows)
    return Outcome({"vectors": [asdict(one) for one in found]}, text)
