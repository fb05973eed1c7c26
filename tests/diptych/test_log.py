import json
import logging
from pathlib import Path

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


def test_the_tracker_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=tmp_path / "tensorboard")
    log.write(7, {"train/lr": 0.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/lr")] == [(7, 0.25)]


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
