"""The bias sweep, by hand and against many sampled biases."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.diptych_eval.fakes import ColourEncoder, benchmark

from diptych.config import from_tree
from diptych.errors import DataError, DiptychError
from diptych_eval import unseen
from diptych_eval.embedder import Embedder
from diptych_eval.tasks.unseen_pairs import UnseenPairs
from diptych_eval.unseen import Asked, bias_sweep, choose_threshold, feasibility


def test_by_hand() -> None:
    trained = torch.tensor([True, True, False])
    scores = torch.tensor([[3.0, 1.0, 1.0], [1.0, 4.0, 3.5], [2.0, 0.0, 1.0], [5.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 2, 2])
    # Trained: right while b < 2, b < 0.5. Untrained: right where b > 1, b > 5.
    found = bias_sweep(scores, labels, trained)
    assert found.trained.tolist() == [1.0, 0.5, 0.5, 0.0, 0.0]
    assert found.untrained.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0]
    assert found.harmonic_mean == pytest.approx(0.5)
    assert found.area == pytest.approx(0.5 * 0.5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_it_is_what_sampled_biases_tend_to(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (9, 4), generator=generator).double()
    labels = torch.cat([torch.tensor([0, 3]), torch.randint(0, 4, (7,), generator=generator)])
    trained = torch.tensor([True, True, False, False])
    found = bias_sweep(scores, labels, trained)
    points = set()
    for bias in torch.arange(-8, 8, 0.25) + 0.125:
        biased = scores + torch.where(trained, 0.0, bias)
        right = biased.gather(1, labels[:, None]) > biased.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
        points.add(tuple(float(right[mask].double().mean()) for mask in (trained[labels], ~trained[labels])))
    assert {(float(s), float(u)) for s, u in zip(found.trained, found.untrained, strict=True)} == points


@pytest.mark.parametrize("trained", [[True, True], [False, False]])
def test_one_kind_alone_is_refused(trained: list[bool]) -> None:
    with pytest.raises(ValueError, match="of trained and of untrained"):
        bias_sweep(torch.eye(2), torch.tensor([0, 1]), torch.tensor(trained))


def test_the_task_reads_which_were_trained(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "set")
    (tmp_path / "trained.txt").write_text("k0\nk1\nk2\n")
    task = UnseenPairs("x", str(root), str(tmp_path / "trained.txt"))
    found = task.run(Embedder(ColourEncoder()))
    assert found.metrics["auc"] == pytest.approx(1.0)
    assert found.notes["num_trained"] == 3
    (tmp_path / "trained.txt").write_text("k0\nsomething\n")
    with pytest.raises(DataError, match="'something' is no class of the set"):
        task.run(Embedder(ColourEncoder()))
    (tmp_path / "trained.txt").write_text("".join(f"k{i}\n" for i in range(12)))
    with pytest.raises(DataError, match="a sweep needs candidates and pictures of trained and of untrained"):
        task.run(Embedder(ColourEncoder()))


def words(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(n, 6, generator=generator).double(), dim=1) for n in (4, 5))  # type: ignore[return-value]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_feasibility_is_its_definition(seed: int) -> None:
    attributes, objects = words(seed)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    trained = torch.rand(20, generator=torch.Generator().manual_seed(seed)) < 0.3
    seen = [(a, o) for (a, o), known in zip(pairs.tolist(), trained.tolist(), strict=True) if known]
    found = feasibility(pairs, trained, attributes, objects)
    for row, (a, o) in enumerate(pairs.tolist()):
        of_attribute = max((float(attributes[a] @ attributes[b]) for b, other in seen if other == o), default=-1.0)
        of_object = max((float(objects[o] @ objects[other]) for b, other in seen if b == a), default=-1.0)
        expected = float("inf") if trained[row] else (of_attribute + of_object) / 2
        assert float(found[row]) == pytest.approx(expected, abs=1e-12)


def asked(seed: int) -> Asked:
    generator = torch.Generator().manual_seed(seed)
    pictures, classes = (F.normalize(torch.randn(n, 6, generator=generator).double(), dim=1) for n in (40, 20))
    trained = torch.arange(20) < 6
    return Asked(pictures + 2 * classes[torch.arange(40) % 10], classes, torch.arange(40) % 10, trained)


def test_a_sweep_over_candidates_is_one_over_these_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, and with pictures of what is no candidate right at no bias."""
    question = asked(0)
    kept = torch.arange(20) != 8
    whole = bias_sweep(question.pictures @ question.classes.T, question.labels, question.is_trained)
    monkeypatch.setattr(unseen, "_ENTRIES", 60)
    assert question.sweep().trained.equal(whole.trained)
    found = question.sweep(kept)
    is_measured = question.labels != 8
    labels = question.labels[is_measured]
    fewer = (question.pictures[is_measured] @ question.classes.T)[:, kept]
    expected = bias_sweep(fewer, torch.where(labels > 8, labels - 1, labels), question.is_trained[kept])
    assert found.trained.equal(expected.trained)
    torch.testing.assert_close(found.untrained * 16, expected.untrained * 12)  # 16 untrained pictures, 4 of them of 8


def test_the_threshold_is_the_best_on_what_is_held_out() -> None:
    question, feasible = asked(1), torch.rand(20, generator=torch.Generator().manual_seed(1)).double()
    feasible[:6] = torch.inf
    feasible[6:10] += 0.5  # what pictures show is more likely than most others
    chosen = choose_threshold(question, feasible)
    areas = {}
    for step in range(21):
        low, high = float(feasible.min()), float(feasible[6:].max())
        threshold = low + (high - low) * step / 20
        kept = feasible >= threshold - 1e-12
        scores = (question.pictures @ question.classes.T).masked_fill(~kept, -torch.inf)
        areas[threshold] = bias_sweep(scores, question.labels, question.is_trained).area
    best = max(areas.values())
    assert chosen == pytest.approx(next(threshold for threshold, area in areas.items() if area == best))
    assert best > areas[float(feasible.min())]


def open_world(tmp_path: Path, **keys: Any) -> UnseenPairs:
    root = benchmark(tmp_path / "set")
    (tmp_path / "trained.txt").write_text("k0\nk1\nk2\n")
    (tmp_path / "attributes.txt").write_text("k\nj\n")
    (tmp_path / "objects.txt").write_text("".join(f"{number}\n" for number in range(12)))
    given = {name: str(tmp_path / f"{name}.txt") for name in ("attributes", "objects")}
    world = given | {"pattern": "{attribute}{object}"} | keys
    tree = {"type": "unseen_pairs", "dataset": "x", "root": str(root), "trained": str(tmp_path / "trained.txt")}
    return from_tree(UnseenPairs, tree | {"open_world": world})


def test_an_open_world_has_all_pairs(tmp_path: Path) -> None:
    task = open_world(tmp_path)
    found = task.run(Embedder(ColourEncoder()))
    assert found.notes == {"num_candidates": 24, "num_trained": 3}
    assert found.metrics["auc"] == pytest.approx(1.0)  # pictures are exactly what names say
    assert {str(tmp_path / "attributes.txt"), str(tmp_path / "objects.txt")} < set(task.files())


def test_pairs_that_are_unlike_what_was_trained_are_left_out(tmp_path: Path) -> None:
    embedder = Embedder(ColourEncoder())
    attributes, objects = embedder.texts(["k", "j"]).double(), embedder.texts([str(n) for n in range(12)]).double()
    # Of k's pairs: its own cosine is -1 where no attribute was trained with the object, its objects are 0, 1, 2.
    feasible = {f"k{n}": (float((objects[n] @ objects[:3].T).max()) - 1) / 2 for n in range(3, 12)}
    feasible |= {f"j{n}": (float(attributes[0] @ attributes[1]) if n < 3 else -1.0) / 2 - 0.5 for n in range(12)}
    threshold = sorted(feasible.values())[12] - 1e-6
    found = open_world(tmp_path, threshold=threshold).run(embedder)
    kept = {name for name, value in feasible.items() if value >= threshold}
    assert found.notes == {"num_candidates": 3 + len(kept), "num_trained": 3, "num_pairs": 24, "threshold": threshold}
    right = sum(f"k{n}" in kept for n in range(3, 12)) / 9
    assert found.metrics["untrained"] == pytest.approx(right)


def test_the_threshold_comes_from_another_part(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'test' is no other part of the same classes"):
        open_world(tmp_path, held_out="test").run(Embedder(ColourEncoder()))
    shutil.copytree(tmp_path / "set" / "test", tmp_path / "set" / "val")
    task = open_world(tmp_path, held_out="val")
    found = task.run(Embedder(ColourEncoder()))
    assert found.notes["threshold"] == pytest.approx(-1.0)  # there nothing is gained by leaving out
    assert str(tmp_path / "set" / "val" / "0.tar") in task.files()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"threshold": 0.1, "held_out": "val"}, r"threshold must lie in \[-1, 1\], or be chosen on held_out"),
        ({"threshold": 2}, r"threshold must lie in \[-1, 1\]"),
        ({"pattern": "{object}"}, "pattern must hold {attribute} and {object} once each"),
        ({"pattern": "{attribute} {object}"}, "class 'k0' is no pair of an attribute and an object"),
    ],
)
def test_a_wrong_world_is_one_line(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(DiptychError, match=said) as caught:
        open_world(tmp_path, **keys).run(Embedder(ColourEncoder()))
    assert "\n" not in str(caught.value)
