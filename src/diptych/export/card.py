"""README.md of an export: what the model is, what it was trained on, how good it is, how it is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import nn

from diptych.models.dual_encoder import DualEncoder
from diptych.version import __version__


@dataclass(frozen=True)
class Measured:
    """One figure of an evaluation."""

    task: str
    dataset: str
    metric: str
    value: float


@dataclass(frozen=True)
class Origin:
    """What is known of an exported model besides its weights."""

    name: str = ""
    """Its name, or that of the run's folder."""
    architecture: str = ""
    """YAML of the towers, as in a run's configuration; empty: what the model itself knows."""
    data: str = ""
    """YAML of the data, as in a run's configuration."""
    samples_seen: int | None = None
    measured: tuple[Measured, ...] = ()


UNKNOWN = Origin()


@dataclass(frozen=True)
class Library:
    """Who opens the export, and how."""

    name: str
    """As the hubs spell it: `open_clip`, `transformers`, `onnx`."""
    title: str
    usage: str
    """Python that opens FOLDER and embeds a picture and captions."""
    notes: tuple[str, ...] = ()
    """What a user of the export must know."""


def write(folder: Path, model: DualEncoder, library: Library, origin: Origin) -> None:
    """Writes the card into the folder."""
    (folder / "README.md").write_text(text(model, library, origin), encoding="utf-8")


def text(model: DualEncoder, library: Library, origin: Origin) -> str:
    """The card, Markdown with YAML front matter; a licence is left for the owner to name."""
    front = {
        "library_name": library.name,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "image-text-retrieval", "diptych"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}# license: name the one that weights and data allow\n---",
        f"# {Path(origin.name).name or 'A dual encoder'}",
        f"A dual encoder of pictures and captions, written by diptych {__version__} for {library.title}.",
        "## Use\n\n" + _fenced("python", library.usage),
        *([_notes(library.notes)] if library.notes else []),
        "## Model\n\n" + _facts(model),
    ]
    if architecture := origin.architecture or _architecture(model):
        parts.append(_fenced("yaml", architecture))
    parts.append("## Training\n\n" + _training(origin))
    parts.append("## Evaluation\n\n" + _figures(origin.measured))
    return "\n\n".join(parts) + "\n"


def _facts(model: DualEncoder) -> str:
    halves: dict[str, nn.Module] = {"image tower": model.image_tower, "text tower": model.text_tower}
    if model.text_decoder is not None:
        halves["text decoder"] = model.text_decoder
    halves["all"] = model
    counts = [
        (f"parameters, {name}", f"{sum(p.numel() for p in part.parameters()):,}") for name, part in halves.items()
    ]
    rows = [
        *counts,
        ("features", f"{model.embed_dim} numbers, unit norm"),
        (
            "pictures",
            f"{model.image_size} x {model.image_size}, mean {_list(model.pixels.mean)}, std {_list(model.pixels.std)}",
        ),
        ("captions", f"up to {model.tokenizer.context_length} tokens"),
        ("logit scale", f"{model.logit_scale.detach().exp().item():.4g}"),
    ]
    if model.logit_bias is not None:
        rows.append(("logit bias", f"{model.logit_bias.item():.4g}"))
    return _table(("", ""), rows)


def _architecture(model: DualEncoder) -> str:
    if model.open_clip_config is not None:
        return yaml.safe_dump(model.open_clip_config, sort_keys=False)
    config = getattr(getattr(model.image_tower, "model", None), "config", None)  # of towers of transformers
    return yaml.safe_dump({"model_type": config.model_type, "from": config.name_or_path}) if config is not None else ""


def _training(origin: Origin) -> str:
    seen = f"{origin.samples_seen:,} samples seen." if origin.samples_seen is not None else ""
    data = "Data, as in the run's configuration:\n\n" + _fenced("yaml", origin.data) if origin.data else ""
    return "\n\n".join(part for part in (seen, data) if part) or "Not recorded."


def _figures(measured: Sequence[Measured]) -> str:
    if not measured:
        return "Not measured."
    rows = [(one.task, one.dataset, one.metric, f"{one.value:.4f}") for one in measured]
    return _table(("task", "data", "metric", "value"), rows)


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _fenced(language: str, code: str) -> str:
    return f"```{language}\n{code.strip()}\n```"


def _list(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
