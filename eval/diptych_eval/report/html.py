"""The report of one or several models: one HTML file that needs nothing but itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from diptych import __version__
from diptych.errors import DataError
from diptych.runfolder import write_text
from diptych_eval.compare import Comparison, compare
from diptych_eval.folders import Evaluated, open_folders
from diptych_eval.report import showcase
from diptych_eval.report.plots import COLOURS
from diptych_eval.report.sections import rows_of, sections, training
from diptych_eval.report.tables import LEVEL, Figures
from diptych_eval.result import Result

_TILES = 4


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    value: str
    label: str


@dataclass(frozen=True)
class Protocol:
    """How one result came about."""

    result: Result
    text: str


@dataclass(frozen=True)
class Model:
    """One of the models, for the page."""

    name: str
    colour: str
    weights: str
    facts: tuple[Tile, ...]
    """What is known of its training."""
    config: str
    """Of a run: its config.yaml."""
    protocols: tuple[Protocol, ...]


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Draws the report of runs and evaluations from what is in their folders; parts that are missing are left out.

    Args:
        out: the file; None: report.html in the folder of the run or evaluation.

    Returns:
        The file.

    Raises:
        DataError: a folder is no run and no evaluation, or what is in it cannot be read.
    """
    models = open_folders(folders)
    for model in models:
        if model.run is None and not model.results:
            raise DataError(f"no results · {model.folder} · evaluate first")
    if out is None:
        out = models[0].run.report if models[0].run is not None else models[0].folder / "report.html"
    files = resources.files("diptych_eval.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files.joinpath("report.html.j2").read_text(encoding="utf-8"))
    style = Markup(files.joinpath("report.css").read_text(encoding="utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, template.render(_context(models), style=style, version=__version__))
    return out


def _context(models: tuple[Evaluated, ...]) -> dict[str, Any]:
    figures = Figures(models, compare(models) if len(models) > 1 else Comparison((), (), ()))
    shown = [showcase.shown_of(model) for model in models]
    views = [_model(model, number) for number, model in enumerate(models)]
    return {
        "models": views,
        "title": " · ".join(view.name for view in views),
        "tiles": [*_tiles(models[0]), *views[0].facts],
        "headlines": figures.headlines(),
        "headline_chart": figures.headline_chart(),
        "notes": [f"{one.task} {one.dataset}: {note}" for one in figures.comparison.sets for note in one.notes],
        "level": f"{LEVEL:g}",
        "curves": training(models),
        "sections": sections(figures),
        "galleries": showcase.galleries(shown, "image_queries"),
        "text_galleries": showcase.galleries(shown, "text_queries"),
        "caption_galleries": showcase.caption_galleries(shown),
        "failures": showcase.failures(shown),
        "maps": showcase.maps(models, shown),
    }


def _model(model: Evaluated, number: int) -> Model:
    return Model(
        model.name,
        COLOURS[number % len(COLOURS)],
        model.results[0].model if model.results else "",
        tuple(_facts(rows_of(model))),
        model.run.config.read_text(encoding="utf-8") if model.run is not None else "",
        tuple(
            Protocol(one, yaml.safe_dump(one.protocol, sort_keys=False, allow_unicode=True, default_flow_style=None))
            for one in model.results
        ),
    )


def _tiles(model: Evaluated) -> list[Tile]:
    zeroshot = [one for one in model.results if one.task == "zeroshot" and "top1" in one.metrics]
    return [Tile(f"{one.metrics['top1']:.1%}", f"top-1, {one.dataset}") for one in zeroshot[:_TILES]]


def _facts(rows: Sequence[dict[str, float]]) -> list[Tile]:
    found = []
    if samples := [row["train/samples_seen"] for row in rows if row.get("train/samples_seen")]:
        found.append(Tile(f"{samples[-1]:,.0f}", "samples seen"))
    if speeds := [row["train/samples_per_second"] for row in rows if row.get("train/samples_per_second")]:
        found.append(Tile(f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "samples per second (median)"))
    return found
