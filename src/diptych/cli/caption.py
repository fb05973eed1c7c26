"""`diptych caption`: what a captioner writes about pictures."""

import argparse
from pathlib import Path
from typing import Any

from diptych.cli.arguments import MODEL_HELP, add_verb
from diptych.cli.outcome import Outcome

_NUMBERS = {
    "max_length": (int, "tokens of a caption at most (default: 30)"),
    "min_length": (int, "tokens before its end at least (default: 0)"),
    "beams": (int, "captions followed at once, for beam (default: 5)"),
    "length_penalty": (float, "for beam: log-probability over length to this power (default: 1)"),
    "temperature": (float, "for sample (default: 1)"),
    "top_k": (int, "for sample: of the likeliest words alone (default: 0, all)"),
    "top_p": (float, "for sample: of words that have this probability together (default: 1)"),
    "seed": (int, "for sample (default: 0)"),
    "candidates": (int, "for contrastive: words among which is chosen (default: 5)"),
    "penalty": (float, "for contrastive: weight of likeness to words before (default: 0.6)"),
    "layer_contrast": (int, "a layer of the decoder whose words count against those of the last (default: none)"),
}


def add(verbs: Any) -> None:
    """Declares the verb."""
    caption = add_verb(
        verbs,
        "caption",
        _caption,
        "write a caption for each picture with a captioner (CoCa, or a language model behind pictures)",
        example="diptych caption runs/coca one.jpg two.png --method beam --beams 8",
    )
    caption.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    caption.add_argument("pictures", metavar="PICTURE", nargs="+", type=Path, help="picture files")
    methods = ["greedy", "beam", "sample", "contrastive"]
    caption.add_argument("--method", choices=methods, default="beam", help="how words are chosen (default: beam)")
    for name, (kind, help) in _NUMBERS.items():
        caption.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=help)


def _caption(options: argparse.Namespace) -> Outcome:
    from diptych.config import from_tree
    from diptych.encoder import load
    from diptych.generate import GenerateConfig
    from diptych.generate.files import caption_files

    given = {name: getattr(options, name) for name in ("method", *_NUMBERS)}
    config = from_tree(GenerateConfig, {name: value for name, value in given.items() if value is not None}, where="--")
    encoder = load(options.model)
    found = list(caption_files(encoder.model, options.pictures, config, view=encoder.view))
    values = {"captions": [{"picture": str(path), "caption": text} for path, text in found]}
    return Outcome(values, "\n".join(f"{path}\t{_line(text)}" for path, text in found))


def _line(text: str) -> str:
    """The caption without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)
