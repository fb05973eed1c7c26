import io
import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from diptych import log as logs
from diptych.log import MetricsLog, read_metrics


def test_rows_beyond_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path)
    for step in range(1, 6):
        first.write(step, {"train/loss/total": 1 / step})
    again = MetricsLog(path, resume_step=3)
    again.write(4, {"train/loss/total": 0.5})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert read_metrics(path)[-1]["train/loss/total"] == 0.5


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"a": float("nan"), "b": float("inf"), "c": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": None, "b": None, "c": 2.0}


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "los')
    assert read_metrics(path) == [{"step": 1}]


class Noted:
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append((step, dict(values)))

    def close(self, *, failed: bool = False) -> None:
        self.told.append("failed" if failed else "closed")


@pytest.mark.parametrize(("failed", "end"), [(False, "closed"), (True, "failed")])
def test_trackers_get_the_same_numbers(tmp_path: Path, failed: bool, end: str) -> None:
    trackers = [Noted(), Noted()]
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers=trackers)
    log.write(7, {"train/lr": 0.25})
    log.close(failed=failed)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 7, "train/lr": 0.25}]
    assert [tracker.told for tracker in trackers] == [[(7, {"train/lr": 0.25}), end]] * 2


@pytest.mark.parametrize(
    ("quiet", "rank", "shown"), [(False, 0, ["news", "trouble"]), (True, 0, ["trouble"]), (False, 1, ["trouble"])]
)
def test_who_says_what(quiet: bool, rank: int, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(quiet=quiet, rank=rank)
    logging.getLogger("diptych.train.loop").info("news")
    logging.getLogger("diptych_eval.suite").warning("trouble")
    logging.getLogger("open_clip").info("not ours")
    logging.getLogger().info("not ours either")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == shown


def test_no_bar_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.progress("work", 3) as bar:
        bar.advance(status="x")
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    """Somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("columns", "shown"), [(120, "loss 4.430 · 765 samples/s · data wait 15%"), (60, "loss 4.430")]
)
def test_a_narrow_terminal_cuts_the_text_and_not_the_count(
    columns: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with logs.progress("training run", 1171, done=42) as bar:
        bar.advance(status="loss 4.430 · 765 samples/s · data wait 15%")
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).strip().splitlines()[-1]
    assert last.startswith("training run ")
    assert re.search(rf" 43/1171 (-:--:--|\d:\d\d:\d\d) {shown}", last), last
    assert len(last) <= columns
