"""The numbers that leave the run folder. wandb is a stand-in with the signatures of its documentation."""

import math
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import diptych.testing as make
from diptych.config import to_tree
from diptych.errors import ConfigError, Interrupted
from diptych.log import read_metrics
from diptych.runfolder import RunFolder
from diptych.train import loop
from diptych.train.recipe import Recipe
from diptych.train.trackers import TensorBoard


class StandInRun:
    """A run at Weights & Biases."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self.metrics: dict[str, str | None] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert self.exit_code is None, "a finished run takes no more"
        self.rows.append(data)

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code


class StandIn(ModuleType):
    """The module."""

    class Error(Exception):
        """The base of wandb's errors."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: list[StandInRun] = []
        self.refusal: str | None = None

    def init(
        self,
        *,
        project: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        allow_val_change: bool | None = None,
        resume: str | None = None,
    ) -> StandInRun:
        if self.refusal is not None:
            raise self.Error(self.refusal)
        assert dir is not None
        assert Path(dir).is_dir()
        self.runs.append(StandInRun({"project": project, "id": id, "name": name, "config": config, "resume": resume}))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    log = {"every_steps": 2, "tensorboard": False, "wandb": "project"}
    return make.tiny_recipe(shards, run, **({"total_samples": 48, "log": log} | changes))


def test_wandb_gets_the_configuration_and_the_same_numbers(shards: Path, tmp_path: Path, wandb: StandIn) -> None:
    settings = recipe(shards, tmp_path / "run")
    loop.train(settings, lambda model, ranks: {"set/top1": 0.5})
    (run,) = wandb.runs
    assert run.rows == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in run.rows] == [2, 4, 6, 6]
    assert run.metrics == {"step": None, "*": "step"}
    assert run.settings["config"] == to_tree(settings)
    assert (run.settings["project"], run.settings["name"], run.settings["resume"]) == ("project", "run", "allow")
    assert run.exit_code == 0


def test_a_resumed_run_is_the_same_run_and_a_new_one_another(shards: Path, tmp_path: Path, wandb: StandIn) -> None:
    settings = recipe(shards, tmp_path / "run")
    for _ in range(2):
        loop.train(settings)
    RunFolder(tmp_path / "run").remove()
    loop.train(settings)
    first, again, anew = (run.settings["id"] for run in wandb.runs)
    assert first == again != anew
    assert not set("/\\#?%:") & set(first)


@pytest.mark.parametrize(("error", "code"), [(Interrupted("SIGTERM"), 0), (RuntimeError("a bug"), 1)])
def test_a_run_that_ends_early_is_closed(
    shards: Path, tmp_path: Path, wandb: StandIn, error: Exception, code: int
) -> None:
    def evaluator(model: Any, ranks: Any) -> dict[str, float]:
        raise error

    with pytest.raises(type(error)):
        loop.train(recipe(shards, tmp_path / "run"), evaluator)
    assert wandb.runs[0].exit_code == code


def test_wandb_is_missing(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"not installed · log.wandb · pip install 'diptych\[wandb\]'"):
        loop.train(recipe(shards, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_wandb_refuses(shards: Path, tmp_path: Path, wandb: StandIn) -> None:
    wandb.refusal = "no API key\nconfigured"
    with pytest.raises(ConfigError, match=r"does not start \(no API key configured\) · log.wandb · .wandb login"):
        loop.train(recipe(shards, tmp_path / "run"))


def test_nobody_asks_for_wandb(shards: Path, tmp_path: Path, wandb: StandIn) -> None:
    loop.train(recipe(shards, tmp_path / "run", log={"tensorboard": False}))
    assert not wandb.runs
    assert not (tmp_path / "run" / "wandb_id").exists()


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path, resume_step=0)
    tracker.write(7, {"train/lr": 0.25, "train/loss/total": math.nan})
    tracker.close()
    assert points(tmp_path, "train/lr") == [(7, 0.25)]


def test_tensorboard_has_what_came_before_an_interruption(shards: Path, tmp_path: Path) -> None:
    def evaluator(model: Any, ranks: Any) -> dict[str, float]:
        raise Interrupted("SIGTERM")

    log: Mapping[str, Any] = {"every_steps": 2, "tensorboard": True}
    with pytest.raises(Interrupted):
        loop.train(recipe(shards, tmp_path / "run", log=log), evaluator)
    assert [step for step, _ in points(tmp_path / "run" / "tensorboard", "train/lr")] == [2, 4, 6]
