"""The benchmark of evaluation asks both sides for the same, and says what they answered."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from diptych.bench import eval_floor, eval_peer
from diptych.bench.eval import NAMES, Plan, _our_figures, _our_tasks, _peer_figures, _peer_words, _Places, measure_all
from diptych.bench.eval_data import MadeSet, peer_views, write_set
from diptych.bench.eval_table import BOTH, FLOOR, OURS, PEERS, Report, Row, as_json, table
from diptych.cli import main
from diptych.config import from_tree
from diptych.data.shards import RawSample, list_shards, read_shard
from diptych.encoder import load
from diptych.errors import ConfigError
from diptych.export import to_open_clip
from diptych.models import dual_encoder
from diptych.testing import TINY_MODEL, tiny_model
from diptych_eval.suite import EvalConfig, evaluate

MADE = MadeSet(pictures=20, classes=3, captions=2, size=(40, 32))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", MADE)
    return tmp_path / "set"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    to_open_clip.export(dual_encoder.build(tiny_model(), seed=0), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def places(tmp_path: Path, data: Path, model: Path) -> _Places:
    return _Places(tmp_path, model, data, peer_views(data, tmp_path / "views"))


def samples(data: Path) -> list[RawSample]:
    return [sample for shard in list_shards(str(data / "test")) for sample in read_shard(shard)]


# --- the set -------------------------------------------------------------------------------------------------------


def test_a_made_set_has_everything_once(data: Path) -> None:
    found = samples(data)
    assert len({sample.members["jpg"] for sample in found}) == 20  # equal pictures would tie
    assert {sample.members["cls"] for sample in found} == {b"0", b"1", b"2"}
    captions = [line for sample in found for line in sample.members["txt"].decode().splitlines()]
    assert len(set(captions)) == 40
    assert all(6 <= len(caption.split()) < 14 for caption in captions)
    assert len((data / "classnames.txt").read_text().splitlines()) == 3
    assert len((data / "zeroshot_classification_templates.txt").read_text().splitlines()) == 80
    assert int((data / "test" / "nshards.txt").read_text()) == len(list((data / "test").glob("*.tar"))) == 8


def test_the_peer_sees_the_same_shards_as_two_sets(data: Path, places: _Places) -> None:
    classes, captions = places.views
    assert [path.name for path in sorted(classes.iterdir())] == [
        "classnames.txt",
        "test",
        "zeroshot_classification_templates.txt",
    ]
    assert (captions / "dataset_type.txt").read_text().strip() == "retrieval"
    assert {(view / "test").resolve() for view in places.views} == {data / "test"}


def test_what_is_no_such_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no test/nshards.txt · .*layout=benchmark"):
        peer_views(tmp_path, tmp_path / "views")


# --- what is asked -------------------------------------------------------------------------------------------------


def test_the_peer_is_asked_for_the_same_model_batch_and_precision(places: _Places) -> None:
    plan = Plan(batch=32, workers=2)
    for task, words in enumerate(_peer_words(task, plan, places) for task in (0, 1)):
        options = dict(zip(words[1::2], words[2::2], strict=False))
        assert options["--dataset_root"] == str(places.views[task])
        assert options["--model"] == f"local-dir:{places.model}"
        assert (options["--batch_size"], options["--num_workers"]) == ("32", "2")
        assert "--no_amp" in words
        assert words[words.index("--recall_k") + 1 :][:3] == ["1", "5", "10"]
        assert "--no_amp" not in _peer_words(task, dataclasses.replace(plan, precision="bf16"), places)


def test_our_tasks_report_every_figure_that_is_compared(places: _Places) -> None:
    config = from_tree(EvalConfig, _our_tasks(Plan(batch=8, workers=1), places.data))
    assert (config.embed.batch_size, config.embed.threads, config.embed.precision) == (8, 1, "fp32")
    results = evaluate(load(str(places.model)), config)
    printed: dict[str, Any] = {f"{found.task} {found.dataset}": found.metrics for found in results}
    assert _our_figures(printed | {"report": "r.html"}).keys() == set(NAMES.values())


def test_the_figures_of_both_peer_commands_get_our_names(places: _Places) -> None:
    assert _peer_figures(places) == {}
    places.output(0).write_text(json.dumps({"metrics": {"acc1": 0.5, "acc5": float("nan")}}))
    places.output(1).write_text(json.dumps({"metrics": {"image_retrieval_recall@5": 0.25, "other": 1}}))
    found = _peer_figures(places)
    assert (found["top1"], found["text_to_image/recall@5"]) == (0.5, 0.25)
    assert found.keys() == {"top1", "top5", "text_to_image/recall@5"}


def test_the_floor_counts_what_there_is_to_do(places: _Places, capsys: pytest.CaptureFixture[str]) -> None:
    eval_floor.main(str(places.model), places.data, batch=8, precision="fp32")
    found = json.loads(capsys.readouterr().out)
    assert found["sizes"] == {"pictures": 20, "prompts": 240, "captions": 40}
    assert min(found["seconds"], found["cpu_seconds"]) > 0


def test_the_peer_runs_alone() -> None:
    source = Path(eval_peer.__file__).read_text(encoding="utf-8")
    assert "import diptych" not in source
    assert "from diptych" not in source


# --- what is said --------------------------------------------------------------------------------------------------


def test_the_table_says_ratios_and_differences() -> None:
    rows = (
        Row(OURS, 10.0, (9.0, 12.0), 18.0),
        Row(PEERS[0], 30.0, (30.0, 30.0)),
        Row(PEERS[1], 20.0, (20.0, 20.0)),
        Row(BOTH, 50.0, (50.0, 50.0)),
        Row(FLOOR, 5.0, (5.0, 5.0)),
    )
    figures = {OURS: {"top1": 0.5, "top5": 1.0}, BOTH: {"top1": 0.5001, "top5": float("nan")}}
    report = Report(rows, figures, {"pictures": 1000}, "runs/x", 64, "fp32", {"clip-benchmark": "1.6.2"})
    lines = table(report).splitlines()
    assert "runs/x, fp32, batches of 64; 1,000 pictures" in lines[0]
    assert lines[1] == "clip-benchmark 1.6.2"
    assert "| ours | 10.0 (9.0, 12.0) | 5.00 | 0.50 | 18.0 |" in lines
    assert "| clip-benchmark, zero-shot | 30.0 (30.0, 30.0) |  |  | 0.0 |" in lines
    assert "| clip-benchmark | 50.0 (50.0, 50.0) | 1.00 | 0.10 | 0.0 |" in lines
    assert "| top1 | 0.500000 | 0.500100 | 1.0e-04 |" in lines
    assert report.difference == pytest.approx(1e-4)
    assert as_json(report)["largest_difference"] == report.difference


def test_without_the_peer_nothing_is_compared() -> None:
    rows = (Row(OURS, 10.0, (9.0, 12.0), 18.0), Row(FLOOR, problem="out of memory"))
    report = Report(rows, {OURS: {"top1": 0.5}, BOTH: {}}, {}, "runs/x", 64, "fp32", {})
    lines = table(report).splitlines()
    assert lines[-2:] == ["| ours | 10.0 (9.0, 12.0) |  |  | 18.0 |", "| floor | out of memory | | | |"]
    assert report.difference is None


@pytest.mark.slow
def test_each_round_asks_everybody_and_leaves_nothing(tmp_path: Path) -> None:
    tiny, work, python = tmp_path / "tiny.json", tmp_path / "work", tmp_path / "python"
    towers = TINY_MODEL["towers"]
    tiny.write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": towers["vision"], "text_cfg": towers["text"]}), encoding="utf-8"
    )
    work.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python{sys.version_info[0]} -S "$@"\n')
    python.chmod(0o755)
    said: list[str] = []
    plan = Plan(model=f"open_clip:{tiny}", made=MADE, rounds=1, peer_python=python)
    report = measure_all(plan, progress=said.append, work=work)
    problems = {row.implementation: row.problem for row in report.rows}
    assert problems.keys() == {OURS, *PEERS, FLOOR}
    assert problems[OURS] == problems[FLOOR] == ""
    assert all(row.cpu_seconds > 1 for row in report.rows if row.implementation == OURS)  # torch's import alone
    assert all("No module named 'clip_benchmark'" in problems[name] for name in PEERS)
    assert report.figures[OURS].keys() == set(NAMES.values())
    assert report.sizes == {"pictures": 20, "prompts": 240, "captions": 40}
    assert "round 1 of 1: ours" in said
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--peer-python nowhere/python", "there is no Python at 'nowhere/python' · bench eval --peer-python"),
        ("--batch 0", "must be at least 1 · bench eval"),
        ("--pictures 0", "must be at least 1 · bench eval"),
        ("--picture large", "'large' are no sizes of pictures"),
        ("--data nowhere", "no test/nshards.txt"),
        ("--work nowhere/at/all", "the data cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"bench eval {arguments} --quiet")) == 2
    error = capsys.readouterr().err.strip()
    assert problem in error
    assert len(error.splitlines()) == 1
