import json
from pathlib import Path

import pytest
from tests.diptych_eval.evaluations import Made, write
from tests.diptych_eval.fakes import ColourEncoder, benchmark

from diptych.cli import main
from diptych.config import from_tree
from diptych.errors import DataError
from diptych_eval.compare import Comparison, Metric, compare
from diptych_eval.folders import open_folders
from diptych_eval.suite import EvalConfig, evaluate

KEYS = tuple(f"k{i}" for i in range(12))
FIRST = [1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
SECOND = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1]


def compared(*folders: Path) -> Comparison:
    return compare(open_folders(folders))


def only(found: Comparison, name: str) -> Metric:
    (one,) = found.sets
    return next(metric for metric in one.metrics if metric.name == name)


def zeroshot(right: list[int], keys: tuple[str, ...] = KEYS, **protocol: object) -> Made:
    return Made("zeroshot", "birds", {"mean_per_class": sum(right) / len(right)}, {"top1": right}, keys, protocol)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "data")
    tasks = [
        {"type": "zeroshot", "dataset": "colours", "root": str(root)},
        {"type": "retrieval", "dataset": "colours", "path": str(root / "test")},
    ]
    evaluate(ColourEncoder(), from_tree(EvalConfig, {"tasks": tasks}), out=tmp_path / "a")
    found = compared(tmp_path / "a", tmp_path / "a")
    assert found.models == ("a", "a (2)")
    assert len(found.sets) == 2
    for metric in (metric for one in found.sets for metric in one.metrics):
        (apart,) = metric.differences
        assert apart is not None
        assert apart.value == 0
        if metric.num_rows:
            assert (apart.interval, apart.p, apart.p_holm) == ((0.0, 0.0), 1.0, 1.0)
    assert {metric.name for one in found.sets for metric in one.metrics if metric.num_rows} >= {
        "top1",
        "image_to_text/recall@1",
        "text_to_image/recall@10",
    }


def test_rows_are_matched_by_key_not_by_place(tmp_path: Path) -> None:
    a = write(tmp_path / "a", zeroshot(FIRST))
    order = [7, 3, 0, 11, 1, 2, 10, 4, 9, 5, 8, 6]
    b = write(tmp_path / "b", zeroshot([SECOND[i] for i in order], tuple(KEYS[i] for i in order)))
    metric = only(compared(a, b), "top1")
    assert metric.values == (3 / 12, 9 / 12)
    assert metric.num_rows == 12
    (apart,) = metric.differences
    assert apart is not None
    assert apart.value == pytest.approx(0.5)
    assert apart.p == 2 / 2**6  # six better, none worse: of all signs, those that are all equal
    assert apart.interval is not None
    assert 0 < apart.interval[0] < 0.5 < apart.interval[1]
    (mean,) = only(compared(a, b), "mean_per_class").differences
    assert mean is not None
    assert (mean.value, mean.interval, mean.p) == (pytest.approx(0.5), None, None)


def test_only_rows_in_common_count_and_this_is_said(tmp_path: Path) -> None:
    a = write(tmp_path / "a", zeroshot(FIRST))
    b = write(tmp_path / "b", zeroshot([1, 1, 1, 1], ("k0", "k1", "k2", "other")))
    found = compared(a, b)
    assert only(found, "top1").values == (pytest.approx(2 / 3), 1.0)
    assert only(found, "top1").num_rows == 3
    assert only(found, "mean_per_class").differences == (None,)
    assert found.sets[0].notes == ("pictures: 3 in common of 12, 4; figures are of those in common",)


def test_what_is_of_other_things_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", zeroshot(FIRST), Made("knn", "birds", columns={"top1": [1, 0]}), Made("knn", "fish"))
    b = write(tmp_path / "b", zeroshot([1, 1], ("x", "y")), Made("knn", "birds", columns={"top1": [1, 1]}))
    found = compared(a, b)
    assert [one.task for one in found.sets] == ["knn"]
    assert "no item was asked of all models" in found.notes[0]
    assert found.notes[1] == "knn fish: not measured of b"


def test_equal_keys_are_rows_of_their_own(tmp_path: Path) -> None:
    keys = ("a dog", "a dog", "a cat")
    a = write(tmp_path / "a", zeroshot([1, 0, 0], keys))
    b = write(tmp_path / "b", zeroshot([1, 0, 1], keys))
    metric = only(compared(a, b), "top1")
    assert metric.num_rows == 3
    assert metric.differences[0] is not None
    assert metric.differences[0].p == 1.0


def test_another_protocol_is_said_but_not_what_was_found_of_the_model(tmp_path: Path) -> None:
    bins = {"counts": [1]}, {"counts": [2]}
    a = write(tmp_path / "a", zeroshot(FIRST, templates="name", num_candidates=5, calibration=bins[0]))
    b = write(tmp_path / "b", zeroshot(SECOND, templates="imagenet", num_candidates=7, calibration=bins[1]))
    (note,) = compared(a, b).sets[0].notes
    assert note == "protocol of b: templates 'imagenet' instead of 'name'; num_candidates 7 instead of 5"


def test_without_tables_there_are_differences_alone(tmp_path: Path) -> None:
    a = write(tmp_path / "a", Made("mine", "birds", {"score": 2.0}))
    b = write(tmp_path / "b", Made("mine", "birds", {"score": 5.0}))
    (apart,) = only(compared(a, b), "score").differences
    assert apart is not None
    assert (apart.value, apart.interval, apart.p) == (3.0, None, None)


def test_holm_counts_all_models_and_metrics(tmp_path: Path) -> None:
    others = [write(tmp_path / name, zeroshot(right)) for name, right in (("b", SECOND), ("c", FIRST))]
    first, second = only(compared(write(tmp_path / "a", zeroshot(FIRST)), *others), "top1").differences
    assert first is not None
    assert second is not None
    assert first.p is not None
    assert (first.p_holm, second.p_holm) == (pytest.approx(2 * first.p), 1.0)


def test_names_tell_folders_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / name / "eval", zeroshot(FIRST)) for name in ("x", "y")]
    assert compared(*folders).models == ("x/eval", "y/eval")
    (tmp_path / "x" / "config.yaml").write_text("")
    assert compared(tmp_path / "x", folders[1]).models == ("x", "eval")
    with pytest.raises(DataError, match="no evaluation"):
        open_folders([tmp_path / "nowhere"])


def test_the_verb_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(write(tmp_path / name, zeroshot(right))) for name, right in (("a", FIRST), ("b", SECOND))]
    assert main(["eval", "compare", *folders]) == 0
    shown = capsys.readouterr().out
    assert "zeroshot birds" in shown
    assert "+0.5000" in shown
    assert main(["eval", "compare", *folders, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["sets"]
    assert one["metrics"][0]["values"] == [0.25, 0.75]
    other = str(write(tmp_path / "c", zeroshot([1, 1], ("x", "y"))))
    assert main(["eval", "compare", folders[0], other]) == 2
    assert "nothing to compare" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["eval", "compare", folders[0]])
    assert stop.value.code == 2


def test_rows_of_a_cluster_count_as_one(tmp_path: Path) -> None:
    right = {"a": [0] * 12, "b": [1] * 12}
    clusters = [f"picture {i // 3}" for i in range(12)]
    together = [Made("zeroshot", "birds", {}, {"top1": some}, KEYS, clusters=clusters) for some in right.values()]
    apart = [Made("zeroshot", "birds", {}, {"top1": some}, KEYS) for some in right.values()]
    p = []
    for name, made in (("together", together), ("apart", apart)):
        folders = [write(tmp_path / name / one, some) for one, some in zip(right, made, strict=True)]
        (difference,) = only(compared(*folders), "top1").differences
        assert difference is not None
        p.append(difference.p)
    assert p == [2 / 2**4, 2 / 2**12]


def test_clusters_follow_the_rows_in_common(tmp_path: Path) -> None:
    clusters = ("x", "y", "y", "z", "z", "z", *KEYS[6:])
    a = write(tmp_path / "a", Made("zeroshot", "birds", {}, {"top1": [0] * 12}, KEYS, clusters=clusters))
    keys = ("k5", "k3", "k2", "k0")
    other = Made("zeroshot", "birds", {}, {"top1": [1, 1, 1, 1]}, keys, clusters=("z", "z", "y", "x"))
    (difference,) = only(compared(a, write(tmp_path / "b", other)), "top1").differences
    assert difference is not None
    assert difference.p == 2 / 2**3  # pictures x, y and z, of which z counts twice: all signs alike, or their opposite
