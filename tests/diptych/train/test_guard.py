"""Bad updates are left out and counted, failed runs go back or stop, and a signal costs nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import diptych.testing as make
from diptych.config import dump, from_tree
from diptych.distributed.runtime import Ranks
from diptych.errors import TrainingError
from diptych.log import read_metrics
from diptych.models.dual_encoder import DualEncoder
from diptych.optim import optimizers
from diptych.optim.optimizers import OptimConfig
from diptych.train.guard import Guard, GuardConfig
from diptych.train.loop import train
from diptych.train.recipe import Recipe

CPU = torch.device("cpu")


def judge(guard: Guard, *norms: float) -> list[bool]:
    return [bool(guard.judge(torch.tensor(float(norm)))) for norm in norms]


def test_what_is_no_number_is_left_out() -> None:
    guard = Guard(GuardConfig(max_skipped=2), CPU)
    assert judge(guard, 1, float("nan"), 2, float("inf")) == [False, True, False, True]
    assert guard.skipped() == 2
    assert not guard.failed
    assert judge(guard, float("nan")) == [True]
    assert guard.failed
    assert judge(guard, 1) == [False]
    assert not guard.failed


def test_spikes_are_measured_against_the_running_average() -> None:
    guard = Guard(GuardConfig(spike_factor=3), CPU)
    assert judge(guard, *[1, 50] * 50) == [False] * 100  # the beginning is wild, and nothing is known yet
    for _ in range(2000):
        guard.judge(torch.tensor(1.0))
    assert judge(guard, 2.9, 3.2, 1e9, 2.9) == [False, True, True, False]


def test_a_guard_is_kept() -> None:
    guard, other = Guard(GuardConfig(spike_factor=3), CPU), Guard(GuardConfig(spike_factor=3), CPU)
    judge(guard, *[1.0] * 150, float("nan"))
    other.take(json.loads(json.dumps(guard.to_json())))
    assert other.to_json() == guard.to_json()
    assert judge(other, 4.0) == [True]


def test_an_update_left_out_changes_nothing() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = optimizers.build(OptimConfig(), model)

    def update(gradient: float, *, left_out: bool) -> dict[str, torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizers.step_unless(optimizer, torch.tensor(left_out))
        states = {f"{i}/{k}": v.clone() for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
        return states | {name: value.clone() for name, value in model.state_dict().items()}

    before = update(1.0, left_out=False)
    after = update(float("nan"), left_out=True)
    assert all(value.equal(after[name]) for name, value in before.items())
    moved = update(1.0, left_out=False)
    assert all(moved[name].isfinite().all() for name in moved)
    assert not any(value.equal(moved[name]) for name, value in before.items())


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    keys = {"total_samples": 160, "guard": {"max_skipped": 3}, "evaluate": {"every_samples": 8}}
    keys |= {"checkpoint": {"every_samples": 16}, "optim": {}}
    return make.tiny_recipe(shards, run, **(keys | changes))


class Poison:
    """An evaluator that spoils the weights at some steps."""

    def __init__(self, *steps: int) -> None:
        self._steps, self._calls = steps, 0

    def __call__(self, model: DualEncoder, ranks: Ranks) -> dict[str, float]:
        self._calls += 1
        if self._calls in self._steps:
            model.logit_scale.data.fill_(float("nan"))
        return {}


def test_a_failed_run_stops_and_names_the_ways_out(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no numbers or spikes, at step 10.*guard.on_failure=roll_back"):
        train(recipe(shards, tmp_path / "run"), Poison(7))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("train/skipped_updates", 0) for row in rows if "train/lr" in row] == [0] * 7 + [1, 2, 3]


def test_a_failed_run_goes_back_and_on(shards: Path, tmp_path: Path) -> None:
    settings = recipe(shards, tmp_path / "run", guard={"max_skipped": 3, "on_failure": "roll_back"})
    # Checkpoints at steps 8 and 10 hold the spoiled weights, so the run would go back to those: none are written then.
    settings = from_tree(Recipe, json.loads(json.dumps(_tree(settings))) | {"checkpoint": {"every_samples": 48}})
    train(settings, Poison(7))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/lr" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(row["train/loss/total"] is not None for row in rows)
    assert rows[-1]["train/roll_backs"] == 1


def _tree(settings: Recipe) -> dict[str, Any]:
    from diptych.config import to_tree

    return to_tree(settings)


def test_going_back_ends(shards: Path, tmp_path: Path) -> None:
    settings = recipe(
        shards, tmp_path / "run", guard={"max_skipped": 2, "on_failure": "roll_back", "max_roll_backs": 2}
    )
    with pytest.raises(TrainingError, match="no numbers"):
        train(settings, Poison(*range(3, 100)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_asks_to_be_started_again(shards: Path, tmp_path: Path, number: signal.Signals) -> None:
    changes = {"total_samples": 2400, "checkpoint": {}, "evaluate": {}}
    data = {"shards": str(shards), "lanes": 2, "workers": 2, "captions": {"views": [{"columns": ["name"]}]}}
    settings = recipe(shards, tmp_path / "run", **changes, data=data)
    (tmp_path / "run.yaml").write_text(dump(settings))
    command = [sys.executable, "-m", "diptych", "train", str(tmp_path / "run.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 20:
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, number)  # as slurm does: the loader's processes too
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert f"{number.name} after step" in told
    assert "Traceback" not in told
    (tmp_path / "whole.yaml").write_text(dump(recipe(shards, tmp_path / "whole", **changes, data=data)))
    for name in ("run", "whole"):  # in processes like the first: arithmetic may hang on what a process did before
        subprocess.run(
            [*command[:-1], str(tmp_path / f"{name}.yaml")], check=True, env=environment, stderr=subprocess.PIPE
        )
    found, whole = (
        [(row["step"], row["train/loss/total"]) for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "whole")
    )
    assert found == whole
