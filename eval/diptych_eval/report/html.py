"""The report of a run: one HTML file that needs nothing but itself."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from diptych import __version__
from diptych.errors import DataError
from diptych.log import read_metrics
from diptych.runfolder import RunFolder, write_text
from diptych_eval import artifacts, result
from diptych_eval.artifacts import Artifacts
from diptych_eval.report import gallery
from diptych_eval.report.plots import Series, curve
from diptych_eval.result import Result

_QUERIES, _TEXT_QUERIES, _CONFUSIONS = 12, 6, 12


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    value: str
    label: str


@dataclass(frozen=True)
class GallerySet:
    """The gallery of one set."""

    dataset: str
    queries: list[gallery.Query]


def write_report(run_folder: Path, out: Path) -> Path:
    """Draws the report of a run from its metrics, results and artifacts; parts that are missing are left out.

    Raises:
        DataError: the folder is no run.
    """
    run = RunFolder(run_folder)
    if not run.exists:
        raise DataError(f"not a run (no config.yaml) · {run_folder} · check the path")
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    results = result.read(run.evaluation / "results.json")
    place = {(item.task, item.dataset): i for i, item in enumerate(results)}
    found = [item for item in artifacts.read_all(run.evaluation / "artifacts") if (item.task, item.dataset) in place]
    found.sort(key=lambda item: place[item.task, item.dataset])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        resources.files("diptych_eval.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    write_text(out, template.render(_context(run, rows, results, found)))
    return out


def _context(run: RunFolder, rows: list[Any], results: list[Result], found: list[Artifacts]) -> dict[str, Any]:
    zeroshot = [item for item in found if item.task == "zeroshot"]
    retrieval = [item for item in found if item.task == "retrieval"]
    return {
        "name": run.root.name,
        "tiles": _tiles(rows, results),
        "curves": [Markup(svg) for svg in _curves(rows)],
        "zeroshot": [item for item in results if item.task == "zeroshot"],
        "retrieval": [item for item in results if item.task == "retrieval"],
        "galleries": [GallerySet(item.dataset, gallery.image_queries(item, _QUERIES)) for item in zeroshot],
        "text_galleries": [GallerySet(item.dataset, gallery.text_queries(item, _TEXT_QUERIES)) for item in retrieval],
        "confusions": gallery.worst_confusions(_same_classes(zeroshot), _CONFUSIONS),
        "maps": [Markup(gallery.embedding_map(item)) for item in zeroshot[:2]],
        "config": run.config.read_text(encoding="utf-8"),
        "version": __version__,
        "versions": results[0].versions if results else {},
    }


def _same_classes(found: list[Artifacts]) -> list[Artifacts]:
    """The sets that choose among the same classes as the first: confusions of others are not comparable."""
    return [item for item in found if item.texts == found[0].texts]


def _tiles(rows: list[Any], results: list[Result]) -> list[Tile]:
    zeroshot = [item for item in results if item.task == "zeroshot"]
    tiles = [Tile(f"{item.metrics['top1']:.1%}", f"top-1, {item.dataset}") for item in zeroshot[:4]]
    if samples := [row["train/samples_seen"] for row in rows if row.get("train/samples_seen")]:
        tiles.append(Tile(f"{samples[-1]:,.0f}", "samples seen"))
    if speeds := [row["train/samples_per_second"] for row in rows if row.get("train/samples_per_second")]:
        tiles.append(Tile(f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "samples per second (median)"))
    return tiles


def _curves(rows: list[Any]) -> list[str]:
    def series(name: str, key: str) -> Series:
        points = [
            (row["train/samples_seen"], row[key])
            for row in rows
            if row.get(key) is not None and "train/samples_seen" in row
        ]
        return Series(name, [x for x, _ in points], [y for _, y in points])

    wanted = [
        ("Loss", "train/loss/contrastive", False),
        ("Logit scale", "train/logit_scale", False),
        ("Samples per second", "train/samples_per_second", True),
        ("Learning rate", "train/lr", True),
    ]
    drawn = [(title, series(title, key), zero) for title, key, zero in wanted]
    return [curve(title, [line], x_label="samples seen", from_zero=zero) for title, line, zero in drawn if line.x]
