"""`diptych eval compare`, `diptych report`: results beside each other, in figures and as a page."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cli.arguments import add_verb
from diptych.cli.outcome import Outcome, table
from diptych.errors import ConfigError, DataError

if TYPE_CHECKING:
    from diptych_eval.compare import Comparison, Difference, SetComparison

_FOLDER = "run folder, or folder with results.json"


def add(verbs: Any) -> None:
    """Declares the verbs."""
    comparison = add_verb(
        verbs,
        "eval compare",
        _compare,
        "compare evaluated models item by item: differences to the first, with intervals and p-values",
        example="diptych eval compare runs/first runs/second",
    )
    comparison.add_argument("first", type=Path, metavar="FIRST", help=_FOLDER)
    comparison.add_argument("others", type=Path, metavar="OTHER", nargs="+", help=_FOLDER)
    report = add_verb(
        verbs,
        "report",
        _report,
        "draw the HTML report of a run, of an evaluation, or of several beside each other",
        example="diptych report runs/first runs/second --out both.html",
    )
    report.add_argument("folders", type=Path, metavar="RUN", nargs="+", help=_FOLDER)
    report.add_argument("--out", type=Path, metavar="FILE", help="HTML file (default for one: report.html inside RUN)")
    report.add_argument(
        "--clip-benchmark", type=Path, metavar="FOLDER", help="also write the results as clip-benchmark's JSON files"
    )


def _compare(options: argparse.Namespace) -> Outcome:
    from diptych_eval.compare import compare
    from diptych_eval.folders import open_folders

    found = compare(open_folders([options.first, *options.others]))
    if not found.sets:
        why = found.notes[0] if found.notes else "no results"
        raise DataError(f"nothing to compare ({why}) · {', '.join(found.models)} · evaluate the same tasks for all")
    names = [f"{_letter(number)}  {name}" for number, name in enumerate(found.models)]
    tables = [_table(found, one, number) for one in found.sets for number in range(1, len(found.models))]
    return Outcome(asdict(found), "\n\n".join(["\n".join(names), *tables, *found.notes]))


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"M{number}"


def _table(found: "Comparison", one: "SetComparison", number: int) -> str:
    """One set: the figures of the first and of one other."""
    model = _letter(number)
    head = ["", "A", model, f"{model} − A", "95% interval", "p", "p (Holm)", "rows"]
    rows = [
        (
            metric.name,
            metric.values[0],
            metric.values[number],
            *_cells(metric.differences[number - 1]),
            metric.num_rows or "",
        )
        for metric in one.metrics
    ]
    drawn = table(f"{one.task} {one.dataset}", head, rows)
    return "\n".join([drawn, *(f"note: {note}" for note in one.notes)])


def _cells(apart: "Difference | None") -> tuple[str, str, str, str]:
    if apart is None:
        return "", "", "", ""
    low_high = f"[{apart.interval[0]:+.4f}, {apart.interval[1]:+.4f}]" if apart.interval is not None else ""
    p, p_holm = ("" if one is None else f"{one:.2g}" for one in (apart.p, apart.p_holm))
    return f"{apart.value:+.4f}", low_high, p, p_holm


def _report(options: argparse.Namespace) -> dict[str, Any]:
    from diptych_eval import clip_benchmark
    from diptych_eval.folders import open_folders
    from diptych_eval.report.html import write_report

    if options.out is None and len(options.folders) > 1:
        raise ConfigError(f"no file for a report of {len(options.folders)} models · diptych report · add --out FILE")
    done: dict[str, Any] = {"report": str(write_report(options.folders, options.out))}
    if options.clip_benchmark is not None:
        written = clip_benchmark.write(open_folders(options.folders), options.clip_benchmark)
        done["clip_benchmark"] = f"{len(written)} files in {options.clip_benchmark}"
    return done
