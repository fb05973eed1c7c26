"""The linear probe: its optimum against dense oracles, its choice of a strength, its parts."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.diptych_eval.fakes import ColourEncoder, coloured, reds_and_blues, two_parts
from torch import Tensor

import diptych.testing as make
from diptych.config import from_tree
from diptych.errors import ConfigError, DataError
from diptych_eval import probe
from diptych_eval.embedder import Embedder
from diptych_eval.labelled import Labelled, Parts
from diptych_eval.probe import Problem, choose_strength, held_out
from diptych_eval.result import Result
from diptych_eval.suite import EvalConfig, evaluate
from diptych_eval.tasks.linear_probe import LinearProbe

RED, BLUE, GREEN = (220, 60, 60), (60, 60, 220), (60, 220, 60)


def labelled(features: Tensor, labels: list[int], keys: list[str] | None = None) -> Labelled:
    names = tuple(keys or [f"k{i}" for i in range(len(labels))])
    return Labelled(features, torch.tensor(labels), names, tuple(map(str, range(max(labels) + 1))), "toys")


def cloud(num_classes: int = 3, count: int = 12, dim: int = 4, seed: int = 0) -> Labelled:
    """Classes that overlap, at unit norm."""
    generator = torch.Generator().manual_seed(seed)
    labels = [row % num_classes for row in range(count * num_classes)]
    centres = torch.randn(num_classes, dim, generator=generator)
    features = centres[labels] + torch.randn(len(labels), dim, generator=generator)
    return labelled(F.normalize(features, dim=1), labels)


def scaled(train: Labelled) -> Tensor:
    centred = train.features.double() - train.features.double().mean(0)
    return centred / centred.square().sum(1).mean().sqrt()


def newton(train: Labelled, strength: float, *, rounds: int = 30) -> Tensor:
    """Logits of the training pictures at the optimum, from the whole Hessian."""
    x, y, count = scaled(train), train.labels, len(train.classes)

    def loss(flat: Tensor) -> Tensor:
        point = flat.view(count, -1)
        return F.cross_entropy(x @ point[:, :-1].T + point[:, -1], y) + strength / 2 * point[:, :-1].square().sum()

    flat = torch.zeros(count * (x.shape[1] + 1), dtype=torch.float64)
    for _ in range(rounds):
        slope = torch.autograd.functional.jacobian(loss, flat)
        hessian = torch.autograd.functional.hessian(loss, flat)
        flat = flat - torch.linalg.pinv(hessian, hermitian=True, rtol=1e-12) @ slope
    point = flat.view(count, -1)
    return x @ point[:, :-1].T + point[:, -1]


@pytest.mark.parametrize("strength", [1.0, 1e-1, 1e-2])
def test_the_optimum_is_newtons(strength: float) -> None:
    train = cloud()
    found, right = Problem(train).solve(strength), newton(train, strength)
    # a derivative of 1e-7 over a curvature of `strength` at least
    assert (found.scores(train.features) - right).abs().max() < 1e-4 * max(1.0, float(right.abs().max()))
    assert found.slope < 1e-6


@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**20), st.sampled_from([1.0, 1e-2, 1e-4]))
@settings(max_examples=25, deadline=None)
def test_no_direction_leads_further_down(num_classes: int, dim: int, seed: int, strength: float) -> None:
    train = cloud(num_classes, 6, dim, seed)
    model, x = Problem(train).solve(strength), scaled(train)
    scale = (train.features.double() - train.features.double().mean(0)).square().sum(1).mean().sqrt()
    weight = (model.weight * scale).requires_grad_()
    bias = (model.bias + model.weight @ train.features.double().mean(0)).requires_grad_()
    loss = F.cross_entropy(x @ weight.T + bias, train.labels) + strength / 2 * weight.square().sum()
    slopes = torch.autograd.grad(loss, [weight, bias])
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-5


def test_two_points_by_hand() -> None:
    """x = 1 and -1, so W = (-a, a) with loss log(1 + exp(-2a)) + strength a²: a = sigmoid(-2a) / strength."""
    model = Problem(labelled(torch.tensor([[-1.0], [1.0]]), [0, 1])).solve(0.5)
    a = float(model.weight[1, 0])
    assert a == pytest.approx(1 / (1 + math.exp(2 * a)) / 0.5, abs=1e-6)
    assert model.weight[0, 0] == pytest.approx(-a, abs=1e-6)
    assert model.bias.abs().max() < 1e-6


def test_no_information_leaves_the_shares_of_the_classes_and_ties_count_against_the_model() -> None:
    same = labelled(torch.ones(4, 3), [0, 0, 0, 1])
    shares = Problem(same).solve(1e-2).scores(torch.ones(1, 3)).softmax(1)
    assert shares[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-5)
    even = labelled(torch.ones(4, 3), [0, 0, 1, 1])
    assert Problem(even).solve(1e-2).ranks(even).tolist() == [2, 2, 2, 2]


def test_a_model_that_broke_down_is_not_right() -> None:
    train = labelled(torch.eye(4), [0, 0, 1, 1])
    broken = labelled(torch.full((4, 4), torch.nan), [0, 0, 1, 1])
    assert Problem(broken).solve(1e-2).ranks(broken).tolist() == [2, 2, 2, 2]
    assert Problem(train).solve(1e-2).ranks(broken).tolist() == [2, 2, 2, 2]
    assert choose_strength(broken, share=0.5, seed=0).top1 == 0.0


def test_blocks_order_copies_position_and_length_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train = cloud()
    right = Problem(train).solve(1e-2).scores(train.features)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    for other in (train.rows(order), train.rows(torch.arange(len(train)).repeat(3))):
        assert (Problem(other).solve(1e-2).scores(train.features) - right).abs().max() < 1e-4
    moved = labelled(train.features * 5 + 2, train.labels.tolist())
    assert (Problem(moved).solve(1e-2).scores(moved.features) - right).abs().max() < 1e-4
    monkeypatch.setattr(probe, "_ENTRIES", 7 * 3)
    model = Problem(train).solve(1e-2)
    assert (model.scores(train.features) - right).abs().max() < 1e-4
    assert model.ranks(train).equal((~(right < right.gather(1, train.labels[:, None]))).sum(1))


def test_the_way_there_changes_nothing() -> None:
    problem = Problem(cloud())
    cold, warm = problem.solve(1e-2), problem.solve(1e-2, problem.solve(1e-4))
    assert (cold.weight - warm.weight).abs().max() < 1e-4
    assert problem.solve(1e-2, cold).steps <= 1


# --- strength ----------------------------------------------------------------------------------------------------


def test_what_is_held_out() -> None:
    train = labelled(torch.eye(18), [0] * 10 + [1] * 5 + [2] * 2 + [3])
    marks = held_out(train, share=0.2, seed=0)
    assert [int(marks[train.labels == label].sum()) for label in range(4)] == [2, 1, 1, 0]
    assert [int(held_out(train, share=0.99, seed=0)[train.labels == label].sum()) for label in range(4)] == [9, 4, 1, 0]
    order = torch.arange(17, -1, -1)
    assert held_out(train.rows(order), share=0.2, seed=0).equal(marks[order])
    assert any(not held_out(train, share=0.2, seed=seed).equal(marks) for seed in range(1, 4))


def test_no_coarse_strength_does_better_than_the_chosen_one() -> None:
    train = cloud(4, 20, 8)
    chosen = choose_strength(train, share=0.3, seed=0)
    held = held_out(train, share=0.3, seed=0)
    rest, learned = train.rows(held.nonzero()[:, 0]), Problem(train.rows((~held).nonzero()[:, 0]))
    for exponent in range(0, -12, -2):
        model = learned.solve(10.0**exponent)
        top1 = float((model.ranks(rest) <= 1).double().mean())
        loss = float(F.cross_entropy(model.scores(rest.features), rest.labels))
        assert (chosen.top1, -chosen.loss) >= (top1, -loss - 1e-6)
    assert math.log10(chosen.strength) * 8 == pytest.approx(round(math.log10(chosen.strength) * 8))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(3))
    assert choose_strength(train.rows(order), share=0.3, seed=0).strength == chosen.strength


def test_among_strengths_without_an_error_that_of_the_lowest_loss_is_chosen() -> None:
    features = torch.tensor([[1.0, 0.1 * row] for row in range(10)] + [[-1.0, 0.1 * row] for row in range(10)])
    chosen = choose_strength(labelled(features, [0] * 10 + [1] * 10), share=0.2, seed=0)
    assert chosen.top1 == 1.0
    assert chosen.strength < 1e-6  # without overlap, surer is better
    assert chosen.loss < 1e-3


def test_nothing_to_hold_out() -> None:
    with pytest.raises(DataError, match="no class has two pictures"):
        choose_strength(labelled(torch.eye(3), [0, 1, 2]), share=0.2, seed=0)


# --- the task ----------------------------------------------------------------------------------------------------


def run(root: Path, **options: Any) -> Result:
    task = {"type": "linear_probe", "dataset": "toys", "root": str(root), **options}
    return evaluate(ColourEncoder(), from_tree(EvalConfig, {"tasks": [task]}))[0]


def test_what_a_line_tells_apart_is_told_apart(tmp_path: Path) -> None:
    found = run(reds_and_blues(tmp_path))
    assert found.metrics == {"top1": 1.0, "top5": 1.0, "mean_per_class": 1.0}
    assert found.intervals.keys() == {"top1", "top5"}
    assert (found.num_items, found.protocol["num_training"], found.protocol["num_candidates"]) == (10, 10, 2)
    assert found.protocol["held_out_top1"] == 1.0
    assert 1e-10 <= found.protocol["chosen_strength"] <= 1


def test_half_a_class_wrong_by_hand(tmp_path: Path) -> None:
    parts = {"train": {0: [RED, RED], 1: [BLUE, BLUE]}, "test": {0: [RED, BLUE], 1: [BLUE]}}
    found = run(two_parts(tmp_path, **parts), strength=0.01)
    assert found.metrics["top1"] == pytest.approx(2 / 3)
    assert found.metrics["mean_per_class"] == 0.75
    assert found.protocol["chosen_strength"] == 0.01
    assert "held_out_top1" not in found.protocol


def test_folders_per_class_mean_the_same_class_in_both_parts(tmp_path: Path) -> None:
    for part, classes in {"train": {"a": GREEN, "b": RED, "c": BLUE}, "val": {"b": RED, "c": BLUE}}.items():
        for name, colour in classes.items():
            for number in range(3):
                path = tmp_path / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), colour).save(path)
    found = run(tmp_path, test="val")
    assert (found.metrics["top1"], found.protocol["num_candidates"], found.num_items) == (1.0, 3, 6)
    elsewhere = run(tmp_path / "train", train=str(tmp_path / "train"), test=str(tmp_path / "val"))
    assert elsewhere.metrics == found.metrics


def test_files_are_what_is_read(tmp_path: Path) -> None:
    root = reds_and_blues(tmp_path)
    (root / "classnames.txt").write_text("".join(f"{i}\n" for i in range(8)))
    files = LinearProbe("toys", str(root)).files()
    assert {Path(name).name for name in files} == {"0.tar", "classnames.txt"}
    assert {Path(name).parent.name for name in files if name.endswith("tar")} == {"train", "test"}


def test_classes_follow_their_numbers(tmp_path: Path) -> None:
    root = two_parts(tmp_path, train={10: [RED], 9: [BLUE]}, test={9: [BLUE], 10: [RED]})
    train, test = Parts.open(str(root), "train", "test").embed(Embedder(ColourEncoder()))
    assert train.classes == test.classes == ("9", "10")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0], [0, 1])
    assert test.keys == ("9-0", "10-0")


def bad(root: Path, problem: str) -> Path:
    reds_and_blues(root)
    if problem == "classnames":
        (root / "classnames.txt").write_text("one\ntwo\n")
    elif problem == "unknown":
        two_parts(root, test={3: [RED], 8: [GREEN]})
    elif problem == "single":
        two_parts(root, train={3: [RED, RED]}, test={3: [RED]})
    elif problem == "few":
        two_parts(root, train={3: [RED], 7: [BLUE]})
    elif problem == "unlabelled":
        make.write_shard(root / "train" / "0.tar", [coloured("x", RED)])
    elif problem == "several":
        marks = make_npy(np.array([1, 0, 1]))
        make.write_shard(root / "train" / "0.tar", [coloured("x", RED, npy=marks)])
    elif problem == "empty":
        (root / "train" / "0.tar").unlink()
    return root


def make_npy(values: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("classnames", r"label 3 of sample '3-0' is not among the 2 class names"),
        ("unknown", r"1 classes of the test have no pictures to learn from \('8'\)"),
        ("single", r"one class only \('3'\)"),
        ("few", r"no class has two pictures, one to hold out"),
        ("unlabelled", r"no label of sample 'x'"),
        ("several", r"2 labels of sample 'x'"),
        ("empty", r"no subfolder with pictures"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path: Path, problem: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        run(bad(tmp_path, problem))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder 'validation'"):
        run(reds_and_blues(tmp_path), test="validation")


@pytest.mark.parametrize("wrong", [{"strength": 0}, {"strength": -1.0}, {"held_out": 0}, {"held_out": 1}])
def test_settings_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        from_tree(EvalConfig, {"tasks": [{"type": "linear_probe", "dataset": "d", "root": "r", **wrong}]})
