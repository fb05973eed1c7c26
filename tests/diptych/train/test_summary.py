"""What is said of a run, from its rows."""

from pathlib import Path
from typing import Any

import pytest

from diptych.config import from_tree
from diptych.train.recipe import Recipe
from diptych.train.summary import Ending, Row, duration, summarise

ENDING = Ending(epochs="2-3", steps=20, seconds=3723.4, checkpoint=Path("my runs/a/checkpoints/step-00000030"))


def recipe(**changes: Any) -> Recipe:
    tree = {"run": "my runs/a", "data": {"shards": "s"}, "global_batch": 100, "total_samples": 3000}
    return from_tree(Recipe, tree | changes)


def row(step: int, loss: float | None, **more: float | None) -> Row:
    figures = {
        "train/samples_seen": 100.0 * step,
        "train/samples_per_second": 10.0 * step,
        "data/wait_share": 0.001 * step,
    }
    return {"step": step, "train/loss/total": loss} | figures | more


def test_the_whole_text() -> None:
    rows = [
        row(10, 2.0),
        {"step": 10, "eval/set/top1": 0.25},
        row(20, 0.5),
        row(30, 1.0, **{"data/bad/undecodable": 12.0, "data/bad/no_caption": 3.0, "train/skipped_updates": 4.0}),
        {"step": 30, "eval/set/top1": 0.5, "eval/longer/top1": None},
    ]
    assert summarise(rows, recipe(evaluate={"config": "tasks.yaml"}), ENDING) == (
        "run          my runs/a\n"
        "steps        30 of 30\n"
        "samples      3,000 (epochs 2-3)\n"
        "this start   20 steps in 1:02:03\n"
        "speed        200 samples/s, median\n"
        "data wait    2.0% of the time, mean\n"
        "loss         1.0000 at the end, best 0.5000 at step 20\n"
        "skipped      4 updates, 0 roll-backs\n"
        "bad samples  12 undecodable, 3 no_caption\n"
        "checkpoint   my runs/a/checkpoints/step-00000030\n"
        "\n"
        "last evaluation\n"
        "  set/top1     0.5000  step 30\n"
        "  longer/top1  no number  step 30\n"
        "\n"
        "next\n"
        "  diptych eval 'my runs/a' --config tasks.yaml\n"
        "  diptych report 'my runs/a'\n"
    )


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([row(10, None), row(20, None)], "loss         none was a number"),
        ([row(10, 3.0), row(20, None)], "loss         no number at the end, best 3.0000 at step 10"),
        ([], "loss         none was a number"),
        ([], "steps        0 of 30"),
        ([row(10, 3.0)], "bad samples  none"),
        ([row(10, 3.0)], "skipped      0 updates, 0 roll-backs"),
        ([row(10, 3.0)], "  diptych eval 'my runs/a' --config TASKS.yaml"),
    ],
)
def test_what_is_not_known(rows: list[Row], line: str) -> None:
    assert line in summarise(rows, recipe(), ENDING).splitlines()


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 100_000)] == ["0:00:00", "0:01:00", "1 day, 3:46:40"]
