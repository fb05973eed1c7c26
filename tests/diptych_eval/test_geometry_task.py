"""Geometry of what other tasks rank, against loops over all pairs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.diptych_eval.fakes import ColourEncoder, benchmark, coloured
from torch import Tensor

import diptych.testing as make
from diptych.config import from_tree
from diptych.data.faults import FaultLog
from diptych.errors import DataError
from diptych_eval import items, metrics
from diptych_eval.embedder import EmbeddedSet, Embedder
from diptych_eval.pictures import ShardPictures
from diptych_eval.reading import Item
from diptych_eval.result import Result
from diptych_eval.suite import EvalConfig, evaluate
from diptych_eval.tasks import geometry
from diptych_eval.tasks.family import Matches, Outcome, Task
from diptych_eval.tasks.geometry import Geometry


def mean_of_pairs(features: np.ndarray, labels: list[int]) -> float:
    pairs = [
        float(features[i] @ features[j])
        for i in range(len(labels))
        for j in range(len(labels))
        if i != j and labels[i] == labels[j]
    ]
    return float(np.mean(pairs)) if pairs else math.nan


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_tolerance_is_the_mean_over_pairs(labels: list[int], seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(len(labels), 4))
    found = metrics.tolerance(torch.from_numpy(features), torch.tensor(labels))
    assert found == pytest.approx(mean_of_pairs(features, labels), abs=1e-9, nan_ok=True)


def test_skewness_by_hand() -> None:
    assert metrics.skewness(torch.tensor([0.0, 0.0, 0.0, 4.0])) == pytest.approx((3 * -1 + 27) / 4 / 3**1.5)
    assert metrics.skewness(torch.tensor([-1.0, 1.0])) == 0.0
    assert metrics.skewness(torch.full((5,), 0.1)) == 0.0


class Given(Task):  # without a name: the family stays as it is for other tests
    """A task that has its answer already."""


def outcome(matches: Matches | None) -> Any:
    class Known(Given):
        def run(self, embedder: Embedder) -> Outcome:
            return Outcome({}, 0, matches=matches)

    return Known("given")


def matches_of(images: Tensor, texts: Tensor, words: list[str], right: list[tuple[int, ...]], labels: Any) -> Matches:
    rows = tuple(Item(row, f"p{row}", {}, labels[row], {}) for row in range(len(images)))
    where = ShardPictures.__new__(ShardPictures)  # nobody looks at the pictures
    found = EmbeddedSet(rows, FaultLog(), where, images)
    return Matches(found, tuple(words), texts, tuple(right), torch.ones(len(images), dtype=torch.long))


def unit(seed: int, count: int, dim: int = 5) -> Tensor:
    drawn = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1)


def test_every_figure_is_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_PAIRS", 7)
    images, texts = unit(0, 14), unit(1, 16)
    words = [f"t{number}" for number in range(15)] + ["t0"]
    texts[15] = texts[0]
    right = [(row, row + 1) if row < 7 else (row,) for row in range(13)] + [(14, 15)]
    labels = [(row % 5,) for row in range(14)]
    found = Geometry("toys", outcome(matches_of(images, texts, words, right, labels))).run(Embedder(ColourEncoder()))
    i, t = images.numpy(), texts[:15].numpy()  # the sixteenth is the first again
    own = [tuple(text % 15 for text in some) for some in right]
    squares = [np.mean([np.sum((i[row] - t[text]) ** 2) for text in some]) for row, some in enumerate(own)]
    expected = {
        "alignment": np.mean(squares),
        "modality_gap": np.linalg.norm(i.mean(0) - t.mean(0)),
        "tolerance": mean_of_pairs(i, [row % 5 for row in range(14)]),
        "logit_scale": 10.0,
    }
    for side, rows in (("images", i), ("texts", t)):
        apart = [np.exp(-2 * np.sum((a - b) ** 2)) for m, a in enumerate(rows) for n, b in enumerate(rows) if m != n]
        expected[f"uniformity/{side}"] = np.log(np.mean(apart))
        share = np.linalg.svd(rows, compute_uv=False)
        share /= share.sum()
        expected[f"effective_rank/{side}"] = np.exp(-np.sum(share * np.log(share)))
    for side, anchors, candidates in (("texts", i, t), ("pictures", t, i)):
        near = [set(np.argsort(-(candidates @ anchor))[:10].tolist()) for anchor in anchors]
        counts = np.array([sum(place in some for some in near) for place in range(len(candidates))])
        expected[f"hub_skewness/{side}"] = np.mean((counts - counts.mean()) ** 3) / counts.std() ** 3
        expected[f"never_found/{side}"] = np.mean(counts == 0)
    assert found.metrics == pytest.approx(expected, abs=1e-9)
    by_kind = {table.kind: table for table in found.items}
    assert by_kind["pictures"].columns["alignment"].tolist() == pytest.approx(squares)
    assert by_kind["texts"].keys == tuple(words[:15])
    assert float(by_kind["texts"].columns["occurrences"].sum()) == pytest.approx(10 * 14)
    assert found.notes["num_texts"] == 15


def test_a_hub_by_hand() -> None:
    """Eleven texts, of which each picture finds ten: only text 10 is in nobody's list."""
    texts, images = torch.eye(11), torch.eye(11)[:3] - 0.5 * torch.eye(11)[10]
    known = matches_of(images, texts, [f"t{n}" for n in range(11)], [(row,) for row in range(3)], [()] * 3)
    found = Geometry("toys", outcome(known)).run(Embedder(ColourEncoder()))
    assert found.metrics["never_found/texts"] == pytest.approx(1 / 11)
    assert found.metrics["hub_skewness/texts"] < -2  # one far below, ten equal
    assert not {"never_found/pictures", "hub_skewness/pictures", "tolerance"} & found.metrics.keys()


def test_a_model_that_sees_no_difference() -> None:
    same = torch.ones(12, 4) / 2
    known = matches_of(same, same, [f"t{n}" for n in range(12)], [(row,) for row in range(12)], [(0,)] * 12)
    found = Geometry("toys", outcome(known)).run(Embedder(ColourEncoder())).metrics
    expected = {"alignment": 0, "modality_gap": 0, "tolerance": 1, "hub_skewness/texts": 0, "never_found/texts": 0}
    expected |= {"uniformity/images": 0, "effective_rank/images": 1}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


# --- with the tasks themselves -----------------------------------------------------------------------------------


def run(of: dict[str, Any], out: Path | None = None) -> Result:
    task = {"type": "geometry", "dataset": "toys", "of": {"dataset": "toys", **of}}
    return evaluate(ColourEncoder(), from_tree(EvalConfig, {"tasks": [task]}), out=out)[0]


def test_of_captions_and_of_classes(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "data")
    captions = {"type": "retrieval", "path": str(root / "test"), "forms": [["name"]]}
    found = run(captions, tmp_path / "out")
    assert found.metrics["alignment"] == pytest.approx(0, abs=1e-6)  # the encoder is a perfect one
    assert found.metrics["modality_gap"] == pytest.approx(0, abs=1e-6)
    assert found.metrics["logit_scale"] == 10.0
    assert found.num_items == 12
    assert "tolerance" not in found.metrics  # twelve classes of one picture
    assert "alignment" in found.intervals
    assert {table.kind for table in items.read(tmp_path / "out" / "items", found)} == {"pictures", "texts"}
    classes = run({"type": "zeroshot", "root": str(root)})
    shared = {name for name in found.metrics if "hub" not in name and "never" not in name}
    assert {name: classes.metrics[name] for name in shared} == pytest.approx(
        {name: found.metrics[name] for name in shared}, abs=1e-5
    )


def test_equal_captions_are_one_text(tmp_path: Path) -> None:
    samples = [coloured(f"s{n}", (20 * n, 10, 200), txt=f"caption {n // 2}".encode()) for n in range(8)]
    make.write_shard(tmp_path / "0.tar", samples)
    each, one = (run({"type": "retrieval", "path": str(tmp_path), "equal_texts": equal}) for equal in ("each", "one"))
    assert each.metrics == one.metrics
    assert each.protocol["num_texts"] == 4


def test_a_task_that_ranks_no_texts_is_refused(tmp_path: Path) -> None:
    samples = [make.tiny_sample("a", hard=("wrong",))]
    make.write_shard(tmp_path / "0.tar", samples)
    with pytest.raises(DataError, match=r"^composition ranks no texts for pictures · task geometry toys · set `of`"):
        run({"type": "composition", "path": str(tmp_path)})


def test_files_are_those_of_the_task(tmp_path: Path) -> None:
    root = benchmark(tmp_path)
    tree = {"type": "geometry", "dataset": "g", "of": {"type": "zeroshot", "dataset": "z", "root": str(root)}}
    (task,) = from_tree(EvalConfig, {"tasks": [tree]}).tasks
    assert isinstance(task, Geometry)
    assert task.files() == task.of.files()
