"""The report: one model and several, runs and evaluations, texts that would like to be markup."""

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.diptych_eval.evaluations import Made, write
from tests.diptych_eval.fakes import ColourEncoder, benchmark

import diptych.testing as make
from diptych.cli import main
from diptych.config import dump, from_tree
from diptych.errors import DataError
from diptych.log import MetricsLog
from diptych.testing import tiny_model, tiny_sample
from diptych_eval.report.bars import Bar, chart
from diptych_eval.report.html import write_report
from diptych_eval.suite import EvalConfig, evaluate

EVIL = "<script>alert(1)</script>"
RIGHT, WRONG = [1.0] * 40 + [0.0] * 10, [1.0] * 5 + [0.0] * 45
SHARES = {"calibration": {"counts": [3, 0, 2], "confidence": [0.1, 0, 0.9], "accuracy": [0.2, 0, 0.8]}}


def run_folder(folder: Path, *, evaluated: bool = True, rate: float = 1.0) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(tiny_model()) + f"# {EVIL}\n")
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(1, 6):
        log.write(step, {"train/loss/contrastive": rate / step, "train/samples_seen": 8.0 * step, "train/lr": rate})
    if evaluated:
        data = benchmark(folder / "data")
        tasks = [
            {"type": "zeroshot", "dataset": "colours", "root": str(data)},
            {"type": "retrieval", "dataset": "colours", "path": str(data / "test"), "forms": [["name"]]},
        ]
        evaluate(ColourEncoder(), from_tree(EvalConfig, {"tasks": tasks}), out=folder / "eval")
    return folder


def every_task(right: list[float]) -> list[Made]:
    share = sum(right) / len(right)
    kinds = {"clean": right, "corrupted/fog": right, "corrupted": right}
    degrees: Mapping[str, object] = {"top1": {"fog/1": 0.5, "fog/3": 0.25}, "num_candidates": 50}
    shots = {f"shots_{k}/top1": right[:10] for k in (1, 2)}
    return [
        Made("zeroshot", "birds", {"calibration_error": share}, {"top1": right, "top5": right}, protocol=SHARES),
        Made("zeroshot", "many", {"mean_average_precision": share}),
        Made("retrieval", "coco", {"image_to_text/median_rank": 7}, {"image_to_text/recall@1": right}),
        Made("composition", "foils", {"accuracy/swap": share, "accuracy/mean_of_groups": share}, {"accuracy": right}),
        Made("captioning", "coco", {"bleu_4": share}, {"cider": [1.25 * one for one in right]}),
        Made("linear_probe", "birds", columns={"top1": right}),
        Made("few_shot", "birds", columns=shots),
        Made("robustness", "birds", columns=kinds, protocol=degrees),
        Made("geometry", "birds", {"modality_gap": 0.75}, {"alignment": right}),
        Made("counting", "sheep", {"how_many": 1234.5}),
    ]


class Page(HTMLParser):
    """Tags that are opened and closed in order, and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "path", "use", "rect"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("best " if ("class", "best") in attrs else "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "use", "rect"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def needs_nothing_else(text: str) -> None:
    links = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', text)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(http" not in text
    assert "<script" not in text


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_report_is_one_file_that_needs_nothing_else(tmp_path: Path, evaluated: bool) -> None:
    run = run_folder(tmp_path / "run", evaluated=evaluated)
    assert write_report([run]) == run / "report.html"
    text = (run / "report.html").read_text()
    assert ("Zero-shot classification" in text) == evaluated
    assert "<svg" in text
    assert "At a glance" not in text
    needs_nothing_else(text)
    Page(text)


def test_runs_stand_beside_each_other(tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", rate=2.0)]
    text = write_report(runs, tmp_path / "both.html").read_text()
    needs_nothing_else(text)
    Page(text)
    for heading in ("At a glance", "Zero-shot", "Training", "Gallery: picture", "Gallery: text", "Embedding map"):
        assert heading in text
    assert text.count("config.yaml, resolved") == 2
    loss = re.search(r"<figcaption>Loss</figcaption>(.*?)</figure>", text, re.DOTALL)
    assert loss is not None
    assert all(colour in loss[1] for colour in ("#3b82f6", "#f97316"))
    assert text.count("rank 1<") == 2 * text.count('<article class="query card">')  # both answer every card, rightly


def test_every_task_is_shown_and_the_better_is_marked(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, *every_task(right)) for name, right in (("worse", WRONG), ("better", RIGHT))]
    text = write_report(folders, tmp_path / "both.html").read_text()
    needs_nothing_else(text)
    cells = Page(text).cells
    assert "best ▲ 80.0% [68.0, 90.0]" in cells
    assert "10.0% [2.0, 20.0]" in cells
    assert "best 10.0%" in cells  # of calibration errors, less is better
    assert [cell for cell in cells if "0.75" in cell] == ["0.75", "0.75"]  # geometry: nobody can say which is better
    assert any(cell.startswith("≠ 0.8") for cell in cells)
    assert cells.count("1,234") == 2
    assert "best ▲ 1 [0.85, 1.125]" in cells  # CIDEr is no share
    for heading in (
        "Composition",
        "Captioning",
        "Probes",
        "Few shots",
        "Robustness",
        "Geometry",
        "Other tasks",
        "counting: sheep",
    ):
        assert heading in text
    worse = write_report(folders[::-1], tmp_path / "turned.html").read_text()
    assert "▼ 10.0% [2.0, 20.0]" in Page(worse).cells


def test_what_may_be_chance_is_not_marked(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, *every_task(right)) for name, right in (("a", WRONG), ("b", [1.0, *WRONG[:-1]]))]
    cells = Page(write_report(folders, tmp_path / "both.html").read_text()).cells
    assert any(cell.startswith("best 12.0%") for cell in cells)
    assert not [cell for cell in cells if re.search("[▲▼≠]", cell)]


def test_what_was_not_measured_of_all_is_left_open(tmp_path: Path) -> None:
    first = write(tmp_path / "a", *every_task(RIGHT))
    second = write(tmp_path / "b", Made("zeroshot", "fish", columns={"top1": RIGHT}))
    cells = Page(write_report([first, second], tmp_path / "both.html").read_text()).cells
    assert "80.0% [68.0, 90.0]" in cells
    assert "–" in cells
    assert not [cell for cell in cells if "▲" in cell or "best" in cell]


def test_texts_from_outside_stay_texts(tmp_path: Path) -> None:
    evil = f"{EVIL}$x$ \\frac{{ 雀 & \" '"
    data = tmp_path / "data"
    make.write_shard(data / "0.tar", [tiny_sample(f"k{i}", caption=f"{evil} k{i}") for i in range(4)])
    tasks = [{"type": "retrieval", "dataset": evil, "path": str(data), "forms": [["txt"]]}]
    folder = tmp_path / "a & $b"
    evaluate(ColourEncoder(), from_tree(EvalConfig, {"tasks": tasks}), out=folder)
    other = write(
        tmp_path / "$b",
        Made("zeroshot", evil, {evil: 1.0}, {"top1": RIGHT}, protocol=SHARES | {"note": evil}),
        Made("composition", evil, {f"accuracy/{evil}": 1.0}, {"accuracy": RIGHT}),
        Made(evil, evil, {evil: 1.0}),
    )
    text = write_report([folder, other], tmp_path / "r.html").read_text()
    needs_nothing_else(text)
    Page(text)
    assert "&lt;script&gt;alert(1)" in text
    assert "a &amp; $b" in text


def test_no_report_of_what_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="not a run"):
        write_report([tmp_path], tmp_path / "r.html")
    folder = write(tmp_path / "empty")
    with pytest.raises(DataError, match="no results"):
        write_report([folder])
    assert main(["report", str(folder), str(folder)]) == 2
    assert "add --out FILE" in capsys.readouterr().err


def test_the_verb_writes_rows_of_clip_benchmark_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", Made("zeroshot", "birds", columns={"top1": RIGHT}))
    assert main(["report", str(folder), "--clip-benchmark", str(tmp_path / "rows")]) == 0
    assert (folder / "report.html").is_file()
    assert len(list((tmp_path / "rows").glob("*.json"))) == 1


def test_bars_share_one_scale() -> None:
    bars = [[Bar(0, 0.04, (0.02, 0.06), "4%")], [Bar(0, 0.1, None, "10%"), Bar(1, float("nan"), None, "?")]]
    found = chart([("a", "", bars[0]), ("b", "", bars[1]), ("none", "", [])])
    assert found.ticks == ("0%", "5%", "10%")
    assert [row.label for row in found.rows] == ["a", "b"]
    assert (found.rows[0].lanes[0].width, found.rows[0].lanes[0].whisker) == (40.0, (20.0, 40.0))
    assert [lane.width for lane in found.rows[1].lanes] == [100.0]
