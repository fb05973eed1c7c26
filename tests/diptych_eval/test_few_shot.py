"""Few shots: which pictures are drawn, and what becomes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.diptych_eval.fakes import ColourEncoder, reds_and_blues, two_parts

from diptych.config import from_tree
from diptych.errors import ConfigError, DataError
from diptych_eval import items
from diptych_eval.embedder import Embedder
from diptych_eval.labelled import Labelled, Parts
from diptych_eval.probe import Problem, shuffled_classes
from diptych_eval.result import Result
from diptych_eval.suite import EvalConfig, evaluate


def labelled(labels: list[int], classes: tuple[str, ...]) -> Labelled:
    keys = tuple(f"k{row}" for row in range(len(labels)))
    return Labelled(torch.eye(len(labels)), torch.tensor(labels), keys, classes, "toys")


def drawn(train: Labelled, seed: int, shots: int) -> dict[str, set[str]]:
    """Class → keys."""
    order = shuffled_classes(train, seed, "shots")
    return {train.classes[label]: {train.keys[row] for row in rows[:shots]} for label, rows in enumerate(order)}


def test_a_draw_depends_on_seed_class_and_key_alone() -> None:
    train = labelled([row % 3 for row in range(30)], ("a", "b", "c"))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert drawn(train.rows(order), 0, 4) == drawn(train, 0, 4)
    few = train.rows((train.labels > 0).nonzero()[:, 0])
    without_a = Labelled(few.features, few.labels - 1, few.keys, ("b", "c"), "toys")
    assert drawn(without_a, 0, 4) == {name: keys for name, keys in drawn(train, 0, 4).items() if name != "a"}
    assert any(drawn(train, seed, 4) != drawn(train, 0, 4) for seed in range(1, 4))


def test_fewer_shots_are_a_part_of_more_and_every_picture_has_its_turn() -> None:
    train = labelled([0] * 6 + [1] * 6, ("a", "b"))
    for seed in range(5):
        small, large = drawn(train, seed, 2), drawn(train, seed, 4)
        assert all(len(small[name]) == 2 and small[name] < large[name] for name in "ab")
    first = [next(iter(drawn(train, seed, 1)["a"])) for seed in range(300)]
    counts = [first.count(f"k{row}") for row in range(6)]
    assert min(counts) > 50 - 4 * np.sqrt(300 * 5 / 36)  # four standard deviations of a fair draw


# --- the task ----------------------------------------------------------------------------------------------------


def run(root: Path, out: Path | None = None, **options: Any) -> Result:
    task = {"type": "few_shot", "dataset": "toys", "root": str(root), **options}
    return evaluate(ColourEncoder(), from_tree(EvalConfig, {"tasks": [task]}), out=out)[0]


def overlapping(root: Path) -> Path:
    """Classes between which single pictures mislead."""
    rng = np.random.default_rng(1)

    def near(colour: tuple[int, int, int], count: int) -> list[tuple[int, int, int]]:
        return [tuple(int(c) for c in np.clip(rng.normal(colour, 60), 0, 255)) for _ in range(count)]  # type: ignore[misc]

    return two_parts(
        root, **{part: {0: near((160, 90, 90), 8), 1: near((90, 90, 160), 8)} for part in ("train", "test")}
    )


def test_a_figure_is_the_mean_of_probes_over_draws(tmp_path: Path) -> None:
    root = overlapping(tmp_path)
    found = run(root, tmp_path / "out", shots=[1, 3], draws=4)
    train, test = Parts.open(str(root), "train", "test").embed(Embedder(ColourEncoder()))
    for shots in (1, 3):
        right = []
        for seed in range(4):
            rows = torch.cat([rows[:shots] for rows in shuffled_classes(train, seed, "shots")])
            ranks = Problem(train.rows(rows)).solve(0.03).ranks(test)
            right.append(float((ranks <= 1).double().mean()))
        assert found.metrics[f"shots_{shots}/top1"] == pytest.approx(np.mean(right))
        low, high = found.intervals[f"shots_{shots}/top1"]
        assert min(right) <= low <= np.mean(right) <= high <= max(right)
        (table,) = items.read(tmp_path / "out" / "items", found)
        assert (table.kind, table.keys) == ("draws", ("0", "1", "2", "3"))
        assert table.columns[f"shots_{shots}/top1"].tolist() == right
    assert len(set(right)) > 1  # or there would be no spread to tell of
    assert found.num_items == 16


def test_all_of_a_class_is_the_same_draw_every_time(tmp_path: Path) -> None:
    found = run(reds_and_blues(tmp_path), shots=[5], draws=3)
    assert found.metrics == {"shots_5/top1": 1.0, "shots_5/top5": 1.0, "shots_5/mean_per_class": 1.0}
    spread = run(overlapping(tmp_path / "o"), shots=[8], draws=3)
    assert spread.intervals["shots_8/top1"] == pytest.approx((spread.metrics["shots_8/top1"],) * 2)


def test_a_class_with_fewer_pictures_than_shots(tmp_path: Path) -> None:
    message = r"16 shots, but 2 classes have fewer pictures \('3': 5\) · .*train · leave out shots: 16$"
    with pytest.raises(DataError, match=message):
        run(reds_and_blues(tmp_path))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder 'train'"):
        run(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"shots": []}, {"shots": [0]}, {"shots": [2, 2]}, {"draws": 0}, {"strength": 0}, {"strength": -1}]
)
def test_settings_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        from_tree(EvalConfig, {"tasks": [{"type": "few_shot", "dataset": "d", "root": "r", **wrong}]})
