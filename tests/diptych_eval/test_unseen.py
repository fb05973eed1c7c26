"""The bias sweep, by hand and against many sampled biases."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.diptych_eval.fakes import ColourEncoder, benchmark

from diptych.errors import DataError
from diptych_eval.embedder import Embedder
from diptych_eval.tasks.unseen_pairs import UnseenPairs
from diptych_eval.unseen import bias_sweep


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
