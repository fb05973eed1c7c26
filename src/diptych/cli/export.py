"""`diptych export`: a model in another library's form, checked there, with a card of what is known of it."""

import argparse
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli.arguments import MODEL_HELP, add_overwrite, add_verb
from diptych.cli.outcome import Outcome

if TYPE_CHECKING:
    from diptych.export.card import Origin
    from diptych.runfolder import RunFolder

_PEERS = {"open_clip": "open_clip_torch", "transformers": "transformers", "onnx": "onnxruntime", "peft": "peft"}
"""What an export is opened with again, as packages are called."""


def add(verbs: Any) -> None:
    """Declares the verb."""
    export = add_verb(
        verbs,
        "export",
        _export,
        "write a model in another library's form, and compare the features that it gives there",
        example="diptych export runs/first exported --to transformers",
    )
    export.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    export.add_argument(
        "--to",
        choices=list(_PEERS),
        default="open_clip",
        help="the library that will open it; peft: what LoRA learned alone, all others with it in the weights",
    )
    add_overwrite(export, "an export")


def _export(options: argparse.Namespace) -> Outcome:
    from importlib import import_module

    from diptych.encoder import load
    from diptych.models.merge import merged
    from diptych.runfolder import RunFolder

    target = import_module(f"diptych.export.to_{options.to}")
    model = load(options.model, device="cpu").model
    if options.to != "peft":
        model = merged(model)
    origin = _origin(options.model, RunFolder(Path(options.model)))
    difference = target.export(model, options.out, origin=origin, overwrite=options.overwrite)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    values = {
        "folder": str(options.out),
        "to": options.to,
        "parameters": parameters,
        "largest_difference": asdict(difference),
    }
    package = _PEERS[options.to]
    text = (
        f"folder: {options.out}\nparameters: {parameters:,}\n"
        f"largest difference of the features, opened by {package} {version(package)}: "
        f"{difference.image:.1e} (pictures), {difference.text:.1e} (captions)"
    )
    return Outcome(values, text)


def _origin(name: str, run: "RunFolder") -> "Origin":
    """What a run's folder tells of its model."""
    import yaml

    from diptych import checkpoint
    from diptych.config import read_yaml
    from diptych.export.card import Measured, Origin
    from diptych_eval import result

    if not run.exists:
        return Origin(name)
    tree = read_yaml(run.config)
    newest = checkpoint.newest(run.checkpoints)
    found = result.read(run.evaluation / "results.json")
    return Origin(
        name=str(run.root.resolve()),
        architecture=yaml.safe_dump(tree.get("model", {}), sort_keys=False),
        data=yaml.safe_dump(tree.get("data", {}), sort_keys=False),
        samples_seen=checkpoint.summary(newest).samples_seen if newest is not None else None,
        measured=tuple(
            Measured(one.task, one.dataset, metric, value) for one in found for metric, value in one.metrics.items()
        ),
    )
