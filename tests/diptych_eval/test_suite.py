"""Tasks and suite with an encoder whose answers are known."""

import json
import re
from pathlib import Path

import pytest
from tests.diptych_eval.fakes import ColourEncoder, benchmark

import diptych.testing as make
from diptych.config import from_tree
from diptych.errors import DataError
from diptych.testing import tiny_sample
from diptych_eval import result
from diptych_eval.suite import EvalConfig, evaluate


def config(root: Path) -> EvalConfig:
    tasks = [
        {"type": "zeroshot", "dataset": "colours", "root": str(root)},
        {
            "type": "retrieval",
            "dataset": "colours",
            "path": str(root / "test"),
            "forms": [["name"], ["txt", "name"]],
            "equal_texts": "one",
        },
    ]
    return from_tree(EvalConfig, {"tasks": tasks})


def test_a_perfect_encoder_is_perfect_and_each_set_is_embedded_once(tmp_path: Path) -> None:
    encoder = ColourEncoder()
    zeroshot, retrieval = evaluate(encoder, config(benchmark(tmp_path)))
    assert zeroshot.metrics.keys() == {"top1", "top5", "mean_per_class", "calibration_error"}
    assert [zeroshot.metrics[name] for name in ("top1", "top5", "mean_per_class")] == [1.0, 1.0, 1.0]
    assert zeroshot.intervals["top1"] == (1.0, 1.0)
    assert retrieval.metrics["image_to_text/recall@1"] == 1.0
    assert retrieval.metrics["text_to_image/recall@1"] == 1.0
    assert retrieval.protocol["num_candidates"] == 24
    assert encoder.num_images == 12


def test_one_caption_of_several_pictures_is_right_for_each(tmp_path: Path) -> None:
    samples = [tiny_sample("k0", caption="k0"), tiny_sample("k1", caption="k0"), tiny_sample("k2", caption="k2")]
    make.write_shard(tmp_path / "0.tar", samples)
    task = {"type": "retrieval", "dataset": "shared", "path": str(tmp_path), "forms": [["name"]], "equal_texts": "one"}
    (found,) = evaluate(ColourEncoder(), from_tree(EvalConfig, {"tasks": [task]}))
    assert found.protocol["num_candidates"] == 2
    assert found.metrics["text_to_image/recall@1"] == 1.0


def test_finished_tasks_are_not_repeated_unless_model_or_protocol_changed(tmp_path: Path) -> None:
    root, out = benchmark(tmp_path / "data"), tmp_path / "out"
    first, again, other = ColourEncoder(), ColourEncoder(), ColourEncoder("b")
    results = evaluate(first, config(root), out=out)
    assert evaluate(again, config(root), out=out) == results
    assert again.num_images == 0
    evaluate(other, config(root), out=out)
    assert other.num_images == 12
    fresh = ColourEncoder("b")
    evaluate(fresh, config(root), out=out, overwrite=True)
    assert fresh.num_images == 12


def test_a_set_that_cannot_be_used_keeps_what_was_finished(tmp_path: Path) -> None:
    root, out = benchmark(tmp_path / "data"), tmp_path / "out"
    bad = benchmark(tmp_path / "bad", labels=False)
    tasks = [
        {"type": "zeroshot", "dataset": "good", "root": str(root)},
        {"type": "zeroshot", "dataset": "bad", "root": str(bad)},
    ]
    with pytest.raises(DataError, match="no label of sample 'k0'"):
        evaluate(ColourEncoder(), from_tree(EvalConfig, {"tasks": tasks}), out=out)
    assert [found.dataset for found in result.read(out / "results.json")] == ["good"]


@pytest.mark.parametrize("break_it", ["classnames.txt", "zeroshot_classification_templates.txt", "test/0.tar"])
def test_missing_files_are_named(tmp_path: Path, break_it: str) -> None:
    root = benchmark(tmp_path)
    (root / break_it).unlink()
    with pytest.raises(DataError, match=re.escape(str(root))):
        evaluate(ColourEncoder(), config(root))


def test_labels_beyond_the_names_are_named(tmp_path: Path) -> None:
    root = benchmark(tmp_path)
    (root / "classnames.txt").write_text("only one\n")
    with pytest.raises(DataError, match="not among the 1 class names"):
        evaluate(ColourEncoder(), config(root))


def test_a_results_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(DataError, match="schema 99"):
        result.read(tmp_path / "results.json")
