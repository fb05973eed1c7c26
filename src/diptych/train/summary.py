"""What became of a run, in a page of plain text: from the rows of metrics.jsonl, so that it tells of every start."""

import datetime
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from diptych.train.recipe import Recipe

Row = Mapping[str, float | None]
"""A line of metrics.jsonl; what was no number is None."""
_LOSS = "train/loss/total"
_BAD = "data/bad/"
_EVALUATION = "eval/"


@dataclass(frozen=True)
class Ending:
    """What the rows do not tell."""

    epochs: str
    """Passes over the data."""
    steps: int
    """Optimizer steps since the program was started this time."""
    seconds: float
    """Since the first of them."""
    checkpoint: Path | None
    """The newest."""


def summarise(rows: Sequence[Row], recipe: Recipe, ending: Ending) -> str:
    """The text of summary.txt."""
    trained = [row for row in rows if _LOSS in row]
    last = trained[-1] if trained else {}
    facts = {
        "run": str(recipe.run),
        "steps": f"{last.get('step') or 0:,} of {recipe.total_steps:,}",
        "samples": f"{last.get('train/samples_seen') or 0:,.0f} (epochs {ending.epochs})",
        "this start": f"{ending.steps:,} steps in {duration(ending.seconds)}",
        "speed": _over_rows(trained, "train/samples_per_second", median, "{:,.0f} samples/s, median"),
        "data wait": _over_rows(trained, "data/wait_share", fmean, "{:.1%} of the time, mean"),
        "loss": _loss(trained),
        "skipped": f"{last.get('train/skipped_updates') or 0:.0f} updates, "
        f"{last.get('train/roll_backs') or 0:.0f} roll-backs",
        "bad samples": _bad_samples(last),
        "checkpoint": str(ending.checkpoint or "none"),
    }
    lines = [f"{name:<12} {text}" for name, text in facts.items()]
    return "\n".join([*lines, *_evaluations(rows), "", *_next(recipe), ""])


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))


def _known(rows: Iterable[Row], name: str) -> list[tuple[int, float]]:
    """Step and value of each row in which a metric is a number."""
    return [(int(row["step"] or 0), value) for row in rows if (value := row.get(name)) is not None]


def _over_rows(rows: Sequence[Row], name: str, statistic: Callable[[list[float]], float], form: str) -> str:
    """One number for a metric of all rows."""
    values = [value for _, value in _known(rows, name)]
    return form.format(statistic(values)) if values else "not known"


def _loss(rows: Sequence[Row]) -> str:
    known = _known(rows, _LOSS)
    if not known:
        return "none was a number"
    best_step, best = min(known, key=lambda pair: pair[1])
    final = rows[-1][_LOSS]
    return f"{'no number' if final is None else f'{final:.4f}'} at the end, best {best:.4f} at step {best_step:,}"


def _bad_samples(row: Row) -> str:
    """Counts by reason; they go on over every start."""
    counts = {name.removeprefix(_BAD): count for name, count in row.items() if name.startswith(_BAD) and count}
    return ", ".join(f"{count:,.0f} {reason}" for reason, count in counts.items()) or "none"


def _evaluations(rows: Sequence[Row]) -> list[str]:
    """The last value of each figure that was measured on the way."""
    last = {
        name.removeprefix(_EVALUATION): (row["step"], value)
        for row in rows
        for name, value in row.items()
        if name.startswith(_EVALUATION)
    }
    width = max(map(len, last), default=0)
    shown = [
        f"  {name:<{width}}  {'no number' if value is None else f'{value:.4f}'}  step {step:,}"
        for name, (step, value) in last.items()
    ]
    return ["", "last evaluation", *shown] if shown else []


def _next(recipe: Recipe) -> list[str]:
    """Commands that go on from here."""
    run = shlex.quote(str(recipe.run))
    tasks = shlex.quote(str(recipe.evaluate.config)) if recipe.evaluate.config is not None else "TASKS.yaml"
    return ["next", f"  diptych eval {run} --config {tasks}", f"  diptych report {run}"]
