"""k nearest neighbours against a loop over all pairs, ties included."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.diptych_eval.fakes import ColourEncoder, reds_and_blues, two_parts

from diptych.config import from_tree
from diptych.errors import ConfigError, DataError
from diptych_eval import neighbours
from diptych_eval.labelled import Labelled
from diptych_eval.neighbours import nearest, occurrences
from diptych_eval.result import Result
from diptych_eval.suite import EvalConfig, evaluate
from diptych_eval.tasks.knn import vote

Vectors = list[list[int]]
vectors = st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=1, max_size=9)


def labelled(features: Vectors, labels: list[int], num_classes: int) -> Labelled:
    keys = tuple(f"k{i}" for i in range(len(labels)))
    rows = torch.tensor(features, dtype=torch.float32)
    return Labelled(rows, torch.tensor(labels), keys, tuple(map(str, range(num_classes))), "toys")


def shares(anchor: list[int], candidates: Vectors, k: int) -> dict[int, tuple[int, Fraction]]:
    """Candidate → its score and its share of a place, by counting."""
    scores = [sum(a * b for a, b in zip(anchor, candidate, strict=True)) for candidate in candidates]
    found = {}
    for place, score in enumerate(scores):
        better, equal = sum(other > score for other in scores), scores.count(score)
        share = min(Fraction(1), max(Fraction(0), Fraction(k - better, equal)))
        if share:
            found[place] = (score, share)
    return found


@given(vectors, vectors, st.data())
@settings(max_examples=80, deadline=None)
def test_neighbours_are_those_counted_ties_included(anchors: Vectors, candidates: Vectors, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(candidates)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_ENTRIES", data.draw(st.integers(1, 40)))
        blocks = list(nearest(torch.tensor(anchors).float(), torch.tensor(candidates).float(), k))
        counts = occurrences(torch.tensor(anchors).float(), torch.tensor(candidates).float(), k)
    found: list[dict[int, tuple[float, float]]] = [{} for _ in anchors]
    for block in blocks:
        columns = (block.anchors, block.candidates, block.scores, block.shares)
        for anchor, candidate, score, share in zip(*(column.tolist() for column in columns), strict=True):
            found[anchor][candidate] = (score, share)
    right = [shares(anchor, candidates, k) for anchor in anchors]
    for ours, theirs in zip(found, right, strict=True):
        assert ours == {place: (score, pytest.approx(float(share))) for place, (score, share) in theirs.items()}
        assert sum(share for _, share in theirs.values()) == k
    for place, count in enumerate(counts.tolist()):
        assert count == pytest.approx(float(sum(row[place][1] for row in right if place in row)))


@given(vectors, vectors, st.data())
@settings(max_examples=60, deadline=None)
def test_votes_are_those_counted(train: Vectors, test: Vectors, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(train)))
    labels = data.draw(st.lists(st.integers(0, 3), min_size=len(train), max_size=len(train)))
    truth = data.draw(st.lists(st.integers(0, 3), min_size=len(test), max_size=len(test)))
    found = vote(labelled(train, labels, 4), labelled(test, truth, 4), k=k, temperature=2.0)
    for rank, anchor, label in zip(found.tolist(), test, truth, strict=True):
        votes = [0.0] * 4
        for place, (score, share) in shares(anchor, train, k).items():
            votes[labels[place]] += float(share) * math.exp(score / 2)
        # sums of the same votes in another order may differ in the last bit: ranks are those with either answer
        near = 1e-12 * max(votes)
        others = [votes[other] for other in range(4) if other != label]
        low = 1 + sum(other > votes[label] + near for other in others)
        high = 1 + sum(other >= votes[label] - near for other in others)
        assert low <= rank <= high


def test_temperature_by_hand() -> None:
    """One at cosine 1 against two at 0.6: exp(1/T) > 2·exp(0.6/T) where T < 0.4/ln 2 = 0.577."""
    train = Labelled(
        torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]),
        torch.tensor([0, 1, 1]),
        ("a", "b", "c"),
        ("0", "1"),
        "toys",
    )
    test = labelled([[1, 0]], [0], 2)
    assert vote(train, test, k=3, temperature=0.57).tolist() == [1]
    assert vote(train, test, k=3, temperature=0.59).tolist() == [2]
    assert vote(train, test, k=1, temperature=0.59).tolist() == [1]


def test_ties_by_hand() -> None:
    """Two copies of a picture of two classes share the one place: equal votes, so neither class is first."""
    train, test = labelled([[1, 0, 0], [1, 0, 0], [0, 1, 0]], [0, 1, 2], 3), labelled([[1, 0, 0]] * 3, [0, 1, 2], 3)
    assert vote(train, test, k=1, temperature=0.07).tolist() == [2, 2, 3]
    assert vote(train, test, k=3, temperature=1).tolist() == [2, 2, 3]
    three = labelled([[1, 0, 0], [1, 0, 0], [1, 0, 0]], [0, 0, 1], 2)
    assert vote(three, test.rows(torch.tensor([0, 1])), k=1, temperature=1).tolist() == [1, 2]


def test_two_that_share_a_place_have_one_vote_between_them_by_hand() -> None:
    """exp(3/2) against half of exp(2/2) twice; two whole votes would win."""
    train, test = labelled([[3, 0, 0], [2, 1, 0], [2, -1, 0]], [0, 1, 1], 2), labelled([[1, 0, 0]], [0], 2)
    assert vote(train, test, k=2, temperature=2).tolist() == [1]
    assert vote(train, test, k=3, temperature=2).tolist() == [2]


def test_a_class_without_votes_is_never_among_the_first() -> None:
    train, test = labelled([[1, 0, 0]] * 2 + [[-1, 0, 0]] * 7, [0, 0, *range(1, 8)], 8), labelled([[1, 0, 0]], [5], 8)
    assert vote(train, test, k=2, temperature=1).tolist() == [8]


def test_a_model_that_broke_down_is_not_right() -> None:
    train, test = labelled([[1, 0, 0], [0, 1, 0]], [0, 1], 2), labelled([[1, 0, 0], [0, 1, 0]], [0, 1], 2)
    nothing = Labelled(torch.full((2, 3), torch.nan), test.labels, test.keys, test.classes, "toys")
    assert vote(train, nothing, k=1, temperature=0.07).tolist() == [2, 2]
    half = Labelled(torch.tensor([[torch.nan] * 3, [0, 1, 0]]), train.labels, train.keys, train.classes, "toys")
    assert vote(half, test, k=1, temperature=0.07).tolist() == [2, 1]


# --- the task ----------------------------------------------------------------------------------------------------


def run(root: Path, **options: Any) -> Result:
    task = {"type": "knn", "dataset": "toys", "root": str(root), **options}
    return evaluate(ColourEncoder(), from_tree(EvalConfig, {"tasks": [task]}))[0]


def test_near_pictures_are_of_one_class(tmp_path: Path) -> None:
    found = run(reds_and_blues(tmp_path), k=5)
    assert found.metrics == {"top1": 1.0, "top5": 1.0, "mean_per_class": 1.0}
    assert found.protocol["num_training"] == 10
    assert found.intervals["top1"] == (1.0, 1.0)


def test_mean_per_class_by_hand(tmp_path: Path) -> None:
    red, blue = (220, 60, 60), (60, 60, 220)
    root = two_parts(tmp_path, train={0: [red], 1: [blue]}, test={0: [red, red, blue], 1: [blue]})
    found = run(root, k=1)
    assert (found.metrics["top1"], found.metrics["mean_per_class"]) == (0.75, pytest.approx(5 / 6))


def test_fewer_pictures_than_k(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"10 pictures to learn from, fewer than k=20 · .*train · lower k"):
        run(reds_and_blues(tmp_path))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"temperature": 0}, {"temperature": -1}])
def test_settings_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        from_tree(EvalConfig, {"tasks": [{"type": "knn", "dataset": "d", "root": "r", **wrong}]})
