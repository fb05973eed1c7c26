"""What somebody who watches a run sees."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import diptych.testing as make
from diptych.log import read_metrics
from diptych.train import loop
from diptych.train.recipe import Recipe
from diptych.train.reporter import status


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    log = {"every_steps": 2, "tensorboard": False, "geometry_every_steps": 3}
    data = {"shards": str(shards), "lanes": 2, "workers": 0, "captions": {"views": [{"columns": ["name"]}]}}
    keys = {"data": data, "checkpoint": {"every_samples": 40}, "log": log, "optim": {}}
    return make.tiny_recipe(shards, run, **(keys | changes))


def test_the_status_has_bad_samples_where_there_are_any() -> None:
    values = {"train/loss/total": 1.23456, "train/samples_per_second": 12345.6, "data/wait_share": 0.034}
    assert status(values, bad_samples=0) == "loss 1.235 · 12,346 samples/s · data wait 3%"
    assert status(values, bad_samples=1200) == "loss 1.235 · 12,346 samples/s · data wait 3% · bad samples 1,200"


def test_lines_summary_and_figures_of_a_run(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shards / "000009.tar").write_bytes(b"no tar at all")
    with caplog.at_level(logging.INFO, "diptych"):
        run = loop.train(recipe(shards, tmp_path / "run"), lambda model, ranks: {"set/top1": 0.5})
    lines = [line for line in caplog.messages if line.startswith("step=")]
    form = r"step=\d+/10 loss \d\.\d{3} · [\d,]+ samples/s · data wait \d+% · bad samples [12] · \d+:\d\d:\d\d left"
    assert len(lines) == 5
    assert all(re.fullmatch(form, line) for line in lines), lines
    assert lines[-1].endswith("bad samples 2 · 0:00:00 left")
    rows = [row for row in read_metrics(run.metrics) if "train/lr" in row]
    assert [row["step"] for row in rows if "geometry/alignment" in row] == [4, 6, 10]
    for row in rows:
        both = row["train/grad_norm/image_tower"] ** 2 + row["train/grad_norm/text_tower"] ** 2
        assert both <= row["train/grad_norm"] ** 2 * (1 + 1e-5)  # what is left is the scale's
        assert both >= row["train/grad_norm"] ** 2 * 0.5
    text = run.summary.read_text()
    assert caplog.messages[-1].endswith(text.rstrip())
    assert "steps        10 of 10\n" in text
    assert "bad samples  2 broken_tar\n" in text
    assert f"checkpoint   {run.checkpoints / 'step-00000010'}\n" in text
    assert "  set/top1  0.5000  step 10\n" in text


def test_the_summary_of_a_resumed_run_tells_of_all_of_it(shards: Path, tmp_path: Path) -> None:
    run = loop.train(recipe(shards, tmp_path / "run"))
    whole = run.summary.read_text().splitlines()
    shutil.rmtree(run.checkpoints / "step-00000010")
    loop.train(recipe(shards, tmp_path / "run"))
    resumed = run.summary.read_text().splitlines()
    differing = {name.split("  ")[0] for name, other in zip(whole, resumed, strict=True) if name != other}
    assert differing <= {"this start", "speed", "data wait"}
    assert any(line.startswith("this start   5 steps in ") for line in resumed)
