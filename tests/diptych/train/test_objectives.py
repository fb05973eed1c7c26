"""Objectives inside training: state and parameters are saved, restored and shared; micro-batches change nothing."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diptych.testing as make
from diptych import checkpoint
from diptych.config import dump, from_tree
from diptych.data.batch import Cursors
from diptych.data.loader import build_loader
from diptych.data.reader import Feed
from diptych.errors import ConfigError
from diptych.log import read_metrics
from diptych.losses import objective
from diptych.models import dual_encoder
from diptych.optim import optimizers
from diptych.testing import TINY_MODEL, run_ranks
from diptych.train import checks, loop
from diptych.train.guard import Guard, GuardConfig
from diptych.train.recipe import Recipe
from diptych.train.state import TrainState

OBJECTIVES: dict[str, dict[str, Any]] = {
    "queue": {"contrastive": {"candidates": [{"type": "queue", "size": 20}], "targets": "momentum"}},
    "isogclr": {"contrastive": {"denominator": {"type": "isogclr", "num_samples": 64, "step_size": 0.01}}},
    "adaptive": {"contrastive": {"temperature": "adaptive"}, "regularisers": [{"type": "uniformity", "weight": 0.1}]},
    "many": {
        "contrastive": {
            "targets": "same_caption",
            "weights": ["decoupled", "inverse_propensity"],
            "sample_weight": "loss_based",
            "similarity": {"type": "heads", "heads_count": 2},
        },
        "regularisers": ["alignment", "distillation"],
    },
}


def recipe(shards: Path, run: Path, **changes: Any) -> Recipe:
    keys = {"total_samples": 64, "ema_decay": 0.9, "checkpoint": {"every_samples": 32, "keep_last": 10}}
    return make.tiny_recipe(shards, run, **(keys | changes))


def losses(run: Path) -> list[float]:
    return [row["train/loss/total"] for row in read_metrics(run / "metrics.jsonl")]


def final(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    files = sorted(newest.glob("*.safetensors"))
    return {f"{path.stem}/{name}": value for path in files for name, value in load_file(path).items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resumed_objectives_equal_unbroken_ones(name: str, shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "whole", objective=OBJECTIVES[name]))
    parts = recipe(shards, tmp_path / "parts", objective=OBJECTIVES[name])
    loop.train(parts)
    newest = checkpoint.newest(tmp_path / "parts" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000008"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # as if the run had died after step 4
    loop.train(parts)
    whole, resumed = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.keys() == resumed.keys()
    assert all(value.equal(resumed[key]) for key, value in whole.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    if name != "many":
        assert any(key.startswith("objective/") for key in whole)


def test_parameters_of_an_objective_are_trained(shards: Path, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", objective=OBJECTIVES["adaptive"])
    before = objective.build(config.objective, embed_dim=16, seed=config.seed).state_dict()
    loop.train(config)
    after = final(tmp_path / "run")
    assert before
    for name, value in before.items():
        assert not torch.equal(after[f"objective/{name}"], value)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_train_the_same(size: int, shards: Path, tmp_path: Path) -> None:
    loop.train(recipe(shards, tmp_path / "whole"))
    loop.train(recipe(shards, tmp_path / "parts", micro_batch=size))
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-4, rtol=1e-4)


def test_what_the_stream_does_not_bring_is_refused_before_training(shards: Path, tmp_path: Path) -> None:
    for tree, reason in (
        ({"contrastive": {"targets": "soft_labels"}}, "the stream does not bring label_features"),
        ({"contrastive": {"targets": "same_label"}}, r"the data brings none · data\.labels"),
        ({"contrastive": {"candidates": ["hard_captions"]}}, "name their column in data.captions.hard"),
        ({"regularisers": ["image_grounded"]}, "name their column in data.captions.hard"),
    ):
        with pytest.raises(ConfigError, match=reason):
            loop.train(recipe(shards, tmp_path / "run", objective=tree))
    with pytest.raises(ConfigError, match="set ema_decay"):
        loop.train(recipe(shards, tmp_path / "run", objective=OBJECTIVES["queue"], ema_decay=None))


@pytest.fixture
def hard_shards(tmp_path: Path) -> Path:
    """Two shards of ten samples with one to five hard captions each."""
    for number in range(2):
        keys = [f"s{number}{i}" for i in range(10)]
        wrong = {key: [f"not {k} of {key}" for k in range(1 + i % 5)] for i, key in enumerate(keys)}
        samples = [make.tiny_sample(key, hard=wrong[key]) for key in keys]
        make.write_shard(tmp_path / "hard" / f"{number:06d}.tar", samples)
    return tmp_path / "hard"


HARD = {
    "contrastive": {"candidates": ["hard_captions"]},
    "regularisers": ["image_grounded", "text_grounded", "distillation"],
}


def test_hard_captions_of_the_data_are_trained_with(hard_shards: Path, tmp_path: Path) -> None:
    captions = {"views": [{"columns": ["name"]}], "hard": {"column": "hard", "count": 3}}
    data = {"shards": str(hard_shards), "lanes": 2, "workers": 0, "captions": captions}
    whole = recipe(hard_shards, tmp_path / "whole", objective=HARD, data=data)
    loop.train(whole)
    loop.train(recipe(hard_shards, tmp_path / "parts", objective=HARD, data=data, micro_batch=3))
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-4, rtol=1e-4)
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert rows[0]["train/loss/image_grounded"] > 0.3
    assert rows[-1]["train/loss/image_grounded"] < 0.1  # "not" gives them away
    plain = recipe(hard_shards, tmp_path / "plain", data=data | {"captions": {"views": [{"columns": ["name"]}]}})
    feeds = [Feed(8, 0, 1, 0, 16, dual_encoder.build(plain.model, seed=0).tokenizer) for _ in range(2)]
    for with_hard, without in zip(
        islice(build_loader(whole.data, feeds[0])._generate(Cursors()), 4),
        islice(build_loader(plain.data, feeds[1])._generate(Cursors()), 4),
        strict=True,
    ):
        assert with_hard.keys == without.keys  # they change nothing else
        assert with_hard.images.equal(without.images)
        assert with_hard.hard_tokens.shape == (8, 3, with_hard.tokens.shape[1])
        assert without.hard_tokens.shape[1] == 0


def saved_by_ranks(rank: int, tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A table of samples written on two ranks, as a checkpoint holds it."""
    loss = objective.build(from_tree(objective.ObjectiveConfig, tree), embed_dim=16, seed=0)
    table = loss.contrastive.modules_of_plugs["denominator"].image
    table.store(torch.tensor([2 * rank, 2 * rank + 1]), torch.full((2, 3), float(rank + 1)))
    model = dual_encoder.build(from_tree(dual_encoder.ModelConfig, TINY_MODEL), seed=0)
    optimizer = optimizers.build(optimizers.OptimConfig(), model, loss)
    return (
        TrainState(model, model, loss, optimizer, None, Guard(GuardConfig(), torch.device("cpu")))
        .snapshot()
        .tensors["objective"]
    )


@pytest.mark.distributed
def test_state_written_on_two_ranks_is_read_on_one_and_on_three() -> None:
    tree = {"contrastive": {"denominator": {"type": "isogclr", "num_samples": 7}}}
    saved = run_ranks(saved_by_ranks, 2, tree)
    assert all(value.equal(saved[1][name]) for name, value in saved[0].items())
    for world in (1, 3):
        for found in run_ranks(restored, world, tree, saved[0]):
            assert all(value.equal(found[name]) for name, value in saved[0].items())
    values = saved[0]["contrastive.modules_of_plugs.denominator.image.values"]
    assert values[:, 1].tolist() == pytest.approx([1.0, 1.0, 2.0, 2.0, 0.01, 0.01, 0.01])


def restored(rank: int, tree: dict[str, Any], saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loss = objective.build(from_tree(objective.ObjectiveConfig, tree), embed_dim=16, seed=0)
    loss.take_state(saved)
    return loss.whole_state()


def repeated(rank: int) -> list[float]:
    """Ids that come several times, on one rank and across ranks."""
    loss = objective.build(
        from_tree(objective.ObjectiveConfig, {"contrastive": {"denominator": {"type": "isogclr", "num_samples": 5}}}),
        embed_dim=16,
        seed=0,
    )
    table = loss.contrastive.modules_of_plugs["denominator"].image
    table.store(torch.tensor([3, 3, 4]), torch.arange(3.0)[:, None].repeat(1, 3) + 10 * rank)
    return table.whole()[:, 1].tolist()


@pytest.mark.distributed
def test_of_repeated_ids_the_last_in_rank_order_is_kept() -> None:
    for found in run_ranks(repeated, 2):
        assert found == pytest.approx([0.01, 0.01, 0.01, 11.0, 12.0])


def test_step_offers_are_what_plugs_may_need(shards: Path, tmp_path: Path) -> None:
    config = recipe(shards, tmp_path / "run", objective=OBJECTIVES["many"])
    loss = objective.build(config.objective, embed_dim=16, seed=0)
    checks.check_needs(config, loss)
    assert set(loss.needs) == {"caption_ids", "surface_features", "teacher_features"}
    assert "objective" in dump(config)
