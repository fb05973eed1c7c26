"""The loop is exact: resumed equals never stopped, two processes equal one, and other runs are refused."""

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diptych.testing as make
from diptych import checkpoint
from diptych.config import dump, from_tree
from diptych.data.loader import build_loader
from diptych.data.reader import Feed
from diptych.errors import CheckpointError, ConfigError, DataError
from diptych.log import read_metrics
from diptych.losses import objective
from diptych.models import dual_encoder
from diptych.optim import optimizers
from diptych.testing import TINY_MODEL, run_ranks
from diptych.train import loop
from diptych.train.guard import Guard
from diptych.train.recipe import Recipe
from diptych.train.state import TrainState


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    log = {"every_steps": 1, "tensorboard": False, "geometry_every_steps": 3}
    return make.tiny_recipe(shards, run, **({"ema_decay": 0.9, "log": log} | changes))


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    return load_file(newest / "model.safetensors") | {
        f"ema/{name}": value for name, value in load_file(newest / "ema.safetensors").items()
    }


def losses(run: Path) -> list[float]:
    return [row["train/loss/total"] for row in read_metrics(run / "metrics.jsonl")]


def watched(run: Path) -> list[dict[str, float]]:
    """Of each row what is measured inside the step: norms of gradients, geometry of features."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train/lr" in row]
    return [{n: v for n, v in row.items() if n.startswith(("train/grad_norm", "geometry/"))} for row in rows]


def test_training_learns_and_logs(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "run", total_samples=400))
    found = losses(tmp_path / "run")
    assert len(found) == 50
    assert sum(found[-5:]) < sum(found[:5])


@pytest.mark.parametrize("changes", [{}, {"algorithm": "muon", "rates": {"text_tower": 0.3}, "layer_decay": 0.8}])
def test_resume_equals_never_having_stopped(shards: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    optim = {"peak_lr": 1e-2, "schedule": {"warmup_samples": 16}} | changes
    loop.train(recipe(shards, tmp_path / "whole", optim=optim))
    stopped = recipe(shards, tmp_path / "parts", optim=optim)
    loop.train(stopped)
    make.forget_after(tmp_path / "parts", 6)
    loop.train(stopped)
    whole, parts = final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts")
    assert all(value.equal(parts[name]) for name, value in whole.items())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [row["step"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl")] == list(range(1, 11))


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_accumulation_changes_nothing_but_rounding(shards: Path, tmp_path: Path, micro_batch: int) -> None:
    loop.train(recipe(shards, tmp_path / "whole"))
    loop.train(recipe(shards, tmp_path / "pieces", micro_batch=micro_batch))
    torch.testing.assert_close(losses(tmp_path / "pieces"), losses(tmp_path / "whole"), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_locked_tower_keeps_its_weights(shards: Path, tmp_path: Path, micro_batch: int | None) -> None:
    model = TINY_MODEL | {"frozen": ["image_tower"]}
    loop.train(recipe(shards, tmp_path / "run", model=model, micro_batch=micro_batch))
    start = dual_encoder.build(from_tree(dual_encoder.ModelConfig, model), seed=0).state_dict()
    for name, value in final_weights(tmp_path / "run").items():
        before = start[name.removeprefix("ema/")]
        assert torch.equal(value, before) == name.removeprefix("ema/").startswith("image_tower."), name


def test_the_tail_of_a_run_sees_every_patch(shards: Path, tmp_path: Path) -> None:
    """Its first half is that of a run which drops patches to the end, its second is not; resuming changes nothing."""
    towers = TINY_MODEL["towers"]
    model = {"towers": towers | {"vision": towers["vision"] | {"patch_dropout": 0.5}}}
    tailed = recipe(shards, tmp_path / "tail", model=model, unmasked_tail_samples=40)
    loop.train(tailed)
    loop.train(recipe(shards, tmp_path / "all", model=model))
    tail, dropped = losses(tmp_path / "tail"), losses(tmp_path / "all")
    assert [a == b for a, b in zip(tail, dropped, strict=True)] == [True] * 5 + [False] * 5
    make.forget_after(tmp_path / "tail", 6)
    loop.train(tailed)
    assert losses(tmp_path / "tail") == tail


def test_runs_of_different_precision_in_one_process(shards: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp32"):
        loop.train(recipe(shards, tmp_path / f"{precision}", total_samples=8, precision=precision))


def test_a_finished_run_started_again_changes_nothing(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    loop.train(recipe(shards, tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_another_model_is_refused(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "run"))
    wider = TINY_MODEL | {"towers": TINY_MODEL["towers"] | {"embed_dim": 24}}
    with pytest.raises(CheckpointError, match=r"different model .*embed_dim: 16 before, 24 now"):
        loop.train(recipe(shards, tmp_path / "run", model=wider))
    with pytest.raises(ConfigError, match=r"seed: 0 before, 1 now"):
        loop.train(recipe(shards, tmp_path / "run", seed=1))


def test_a_checkpoint_of_another_model_is_refused(shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "a"))
    wider = TINY_MODEL | {"towers": TINY_MODEL["towers"] | {"embed_dim": 24}}
    other = recipe(shards, tmp_path / "b", model=wider)
    loop.train(other)
    (tmp_path / "a" / "config.yaml").write_text(dump(recipe(shards, tmp_path / "a", model=wider)))
    with pytest.raises(CheckpointError, match="of a different model"):
        loop.train(recipe(shards, tmp_path / "a", model=wider))


def test_a_folder_that_is_no_run_is_left_alone(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        loop.train(recipe(shards, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_evaluation_during_training(shards: Path, tmp_path: Path) -> None:
    calls = []

    def evaluator(model: torch.nn.Module, ranks: Any) -> dict[str, float]:
        calls.append(model.training)
        return {"set/top1": 0.5}

    loop.train(recipe(shards, tmp_path / "run", evaluate={"every_samples": 40}), evaluator)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/set/top1" in row]
    assert calls == [False, False]
    assert [row["step"] for row in rows] == [5, 10]


@pytest.mark.distributed
@pytest.mark.parametrize("configuration", ["cpu", "cpu_fsdp2"])
def test_two_processes_under_accelerate_equal_one(
    shards: Path, tmp_path: Path, launch: Callable[..., None], configuration: str
) -> None:
    loop.train(recipe(shards, tmp_path / "one"))
    (tmp_path / "two.yaml").write_text(dump(recipe(shards, tmp_path / "two")))
    launch(tmp_path / "two.yaml", configuration)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(watched(tmp_path / "two"), watched(tmp_path / "one"), atol=1e-4, rtol=1e-3)
    assert [len(row) for row in watched(tmp_path / "two")] == [3, 3, 9, 3, 3, 9, 3, 3, 9, 3]
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    for name, value in one.items():
        # ten AdamW steps of 1e-2: a gradient's sign may flip where it is zero but for rounding
        torch.testing.assert_close(two[name], value, atol=5e-3, rtol=1e-2, msg=name)
    states = [newest_state(tmp_path / name) for name in ("one", "two")]
    norms = [state["guard"].pop("values") for state in states]
    torch.testing.assert_close(*norms, atol=0, rtol=1e-5)  # float32 sums in another order
    assert states[0] == states[1]
    before = losses(tmp_path / "two")
    make.forget_after(tmp_path / "two", 6)
    launch(tmp_path / "two.yaml", configuration)
    assert losses(tmp_path / "two") == before
    resumed = final_weights(tmp_path / "two")
    assert all(value.equal(resumed[name]) for name, value in two.items())
    make.forget_after(tmp_path / "two", 3)
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    loop.train(recipe(shards, tmp_path / "two"))  # and one process takes over what two have saved
    torch.testing.assert_close(losses(tmp_path / "two"), before, atol=2e-5, rtol=2e-5)
    (tmp_path / "four.yaml").write_text(dump(recipe(shards, tmp_path / "four")))
    launch(tmp_path / "four.yaml", configuration, "--num_processes", "4")
    torch.testing.assert_close(losses(tmp_path / "four"), before, atol=2e-5, rtol=2e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_equals_one_process_and_resumes(
    shards: Path, tmp_path: Path, launch: Callable[..., None], stage: int
) -> None:
    loop.train(recipe(shards, tmp_path / "one"))
    (tmp_path / "two.yaml").write_text(dump(recipe(shards, tmp_path / "two")))
    options = ("--deepspeed_config_file", f"configs/deepspeed/zero{stage}.json")
    launch(tmp_path / "two.yaml", "cpu_zero", *options)
    before = losses(tmp_path / "two")
    torch.testing.assert_close(before, losses(tmp_path / "one"), atol=2e-5, rtol=2e-5)
    assert [len(row) for row in watched(tmp_path / "two")] == [1, 1, 7, 1, 1, 7, 1, 1, 7, 1]  # no norms by tower
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=5e-3, rtol=1e-2, msg=name)
    make.forget_after(tmp_path / "two", 6)
    launch(tmp_path / "two.yaml", "cpu_zero", *options)
    assert losses(tmp_path / "two") == before
    resumed = final_weights(tmp_path / "two")
    assert all(value.equal(resumed[name]) for name, value in two.items())
    make.forget_after(tmp_path / "two", 3)
    loop.train(recipe(shards, tmp_path / "two"))  # and one process takes over
    torch.testing.assert_close(losses(tmp_path / "two"), before, atol=2e-5, rtol=2e-5)


def test_one_process_goes_on_where_two_stopped(shards: Path, tmp_path: Path) -> None:
    """The cursors of both ranks are in a checkpoint: whoever resumes sees the same samples."""
    states = run_ranks(_cursors_after_three_batches, 2, shards)
    assert states[0] == states[1]
    lanes = states[0]["cursors"]["sources"][""]["lanes"]
    assert sorted(lanes) == ["0", "1", "2", "3"]
    assert all(position > 0 for _, position in lanes.values())


def _cursors_after_three_batches(rank: int, shards: Path) -> dict[str, Any]:
    config = recipe(shards, Path("unused"))
    model = dual_encoder.build(config.model, seed=0)
    loss = objective.build(config.objective, embed_dim=model.embed_dim, seed=0)
    guard = Guard(config.guard, torch.device("cpu"))
    state = TrainState(model, model, loss, optimizers.build(config.optim, model, loss), None, guard)
    feed = Feed(global_batch=8, rank=rank, world_size=2, seed=0, image_size=16, tokenizer=model.tokenizer)
    with build_loader(config.data, feed).batches() as batches:
        for batch in islice(batches, 3):
            state.advance(batch, samples=8)
    return state.snapshot().state


def newest_state(run: Path) -> dict[str, Any]:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    return json.loads((newest / "state.json").read_text())
