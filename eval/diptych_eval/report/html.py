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
from diptych_eval import exhibits, result
from diptych_eval.exhibits import Exhibit
from diptych_eval.gallery import Confusion, Query
from diptych_eval.report.plots import Series, curve, embedding_map
from diptych_eval.result import Result

_CONFUSIONS = 12


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    value: str
    label: str


@dataclass(frozen=True)
class GallerySet:
    """The gallery of one set."""

    dataset: str
    queries: tuple[Query, ...]


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
    found = [(item, shown) for item in results if (shown := exhibits.read(run.evaluation / "exhibits", item))]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        resources.files("diptych_eval.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    write_text(out, template.render(_context(run, rows, results, found)))
    return out


def _context(
    run: RunFolder, rows: list[Any], results: list[Result], found: list[tuple[Result, Exhibit]]
) -> dict[str, Any]:
    zeroshot = [(item.dataset, shown) for item, shown in found if item.task == "zeroshot"]
    return {
        "name": run.root.name,
        "tiles": _tiles(rows, results),
        "curves": [Markup(svg) for svg in _curves(rows)],
        "zeroshot": [item for item in results if item.task == "zeroshot" and "top1" in item.metrics],
        "retrieval": [item for item in results if item.task == "retrieval"],
        "galleries": [GallerySet(item.dataset, shown.image_queries) for item, shown in found if shown.image_queries],
        "text_galleries": [GallerySet(item.dataset, shown.text_queries) for item, shown in found if shown.text_queries],
        "confusions": _worst([shown for _, shown in zeroshot]),
        "maps": [Markup(embedding_map(dataset, shown.points)) for dataset, shown in zeroshot[:2]],
        "config": run.config.read_text(encoding="utf-8"),
        "version": __version__,
        "versions": results[0].versions if results else {},
    }


def _worst(found: list[Exhibit]) -> list[Confusion]:
    """Of all sets: the most frequent ones first."""
    every = [confusion for shown in found for confusion in shown.confusions]
    return sorted(every, key=lambda one: (-one.count, -one.similarity))[:_CONFUSIONS]


def _tiles(rows: list[Any], results: list[Result]) -> list[Tile]:
    zeroshot = [item for item in results if item.task == "zeroshot" and "top1" in item.metrics]
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
