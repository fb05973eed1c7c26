"""Handlers, progress bars and `metrics.jsonl`. Handlers are set once by the program, never on import."""

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_OURS = ("diptych", "diptych_eval", "diptych_data")


def setup(*, quiet: bool = False, rank: int = 0) -> None:
    """Sends messages to stderr: warnings from everywhere, our own information from rank 0. Called by programs alone."""
    level = logging.INFO if rank == 0 and not quiet else logging.WARNING
    console = Console(stderr=True, highlight=False)
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=console, show_path=False, omit_repeated_times=False)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


class Bar:
    """One progress bar; `advance` moves it and may change the text at its end."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: int = 1, *, status: str = "") -> None:
        """Moves the bar by `amount`."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=amount, status=status)


class _Status(ProgressColumn):
    """The text at the end; where the terminal is narrow it is cut, not what stands before it."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


@contextmanager
def progress(title: str, total: int | None, *, quiet: bool = False, done: int = 0) -> Iterator[Bar]:
    """A progress bar on stderr; nothing at all where stderr is no terminal or `quiet` is set."""
    if quiet or not sys.stderr.isatty():
        yield Bar(None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _Status(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield Bar(bars, bars.add_task(title, total=total, completed=done, status=""))


class Tracker(Protocol):
    """Whatever takes the same numbers besides."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Named numbers of a step; NaN and infinity may be among them."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Writes out what it still holds; `failed`: the run has ended in an error."""
        ...


class MetricsLog:
    """Appends one JSON object per logged step to `metrics.jsonl`, and hands the same numbers to trackers.

    On resume, rows beyond the checkpoint are dropped: their steps are about to be made again.
    """

    def __init__(self, path: Path, *, resume_step: int = 0, trackers: Sequence[Tracker] = ()) -> None:
        self._path = path
        self._trackers = trackers
        self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Drops the rows behind `step`, which are about to be made again."""
        if self._path.exists():
            kept = [row for row in read_metrics(self._path) if row["step"] <= step]
            self._path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: the step and its named numbers; NaN and infinity become null, which JSON can hold."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | finite) + "\n")
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self, *, failed: bool = False) -> None:
        """Lets the trackers write out what they still hold."""
        for tracker in self._trackers:
            tracker.close(failed=failed)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
