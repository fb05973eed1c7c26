"""Gradients from micro-batches equal those of one pass: dropout, ranks, groups, DDP and FSDP2 included."""

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diptych.config import from_tree
from diptych.distributed.collectives import average_gradients
from diptych.losses.accumulate import accumulate, gradient_sync
from diptych.losses.batch import Moment, Pairs
from diptych.losses.objective import Objective, ObjectiveConfig
from diptych.testing import run_ranks

ROWS, WIDTH = 8, 6


class TwoTowers(nn.Module):
    """Small towers with dropout and a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = nn.Sequential(nn.Linear(WIDTH, 10), nn.Dropout(0.3), nn.GELU(), nn.Linear(10, WIDTH))
        self.text_tower = nn.Sequential(nn.Linear(WIDTH, 10), nn.Dropout(0.3), nn.GELU(), nn.Linear(10, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.image_tower(images), dim=-1),
            "text_features": F.normalize(self.text_tower(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def towers() -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers().double()


def rows_of(rank: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(2, 4 * count, WIDTH, generator=generator, dtype=torch.float64)
    return images[rank * count : (rank + 1) * count], texts[rank * count : (rank + 1) * count]


def objective_of(tree: dict[str, Any]) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    objective = Objective(from_tree(ObjectiveConfig, tree), embed_dim=WIDTH).double()

    def loss(features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        features = dict(features) | {"logit_scale": features["logit_scale"].squeeze()}
        known = {"caption_ids": torch.arange(ROWS) // 2}
        total = objective(Pairs(**features, known=known), Moment()).total
        return total, total.detach()

    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name.removeprefix("module.")] = whole.clone()
    return found


def one_pass(
    model: nn.Module, parts: list[tuple[Tensor, Tensor]], tree: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """All rows with their graph at once, each micro-batch drawing its dropout in turn."""
    torch.manual_seed(7)
    outputs = [model(*part) for part in parts]
    features = {name: torch.cat([o[name] for o in outputs]) for name in ("image_features", "text_features")}
    total, result = objective_of(tree)(features | {"logit_scale": outputs[0]["logit_scale"]})
    total.backward()
    return result, gradients(model)


def in_parts(
    model: nn.Module, parts: list[tuple[Tensor, Tensor]], tree: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    result = accumulate(lambda part: model(*part), parts, objective_of(tree), synchronised=gradient_sync(model))
    return result, gradients(model)


def split(rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    images, texts = rows_of(rank, ROWS)
    return list(zip(images.split(size), texts.split(size), strict=True))


TREES: list[dict[str, Any]] = [
    {},
    {"contrastive": {"normaliser": "sigmoid"}},
    {"contrastive": {"targets": "same_caption", "weights": ["decoupled"]}, "regularisers": ["uniformity"]},
]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("tree", TREES)
def test_micro_batches_equal_one_pass(size: int, tree: dict[str, Any]) -> None:
    parts = split(0, size)
    loss, expected = one_pass(towers(), parts, tree)
    found_loss, found = in_parts(towers(), parts, tree)
    torch.testing.assert_close(found_loss, loss, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)


def test_a_scale_may_be_a_vector_of_one() -> None:
    parts = split(0, 2)
    _, expected = one_pass(towers(), parts, {})
    torch.manual_seed(0)
    model = TwoTowersWithVectorScale().double()
    _, found = in_parts(model, parts, {})
    torch.testing.assert_close(found["logit_scale"].squeeze(), expected["logit_scale"], atol=1e-14, rtol=1e-12)


def test_dropout_would_show() -> None:
    """The proof above has force: other random numbers give other gradients."""
    parts = split(0, 2)
    _, expected = one_pass(towers(), parts, {})
    model = towers()
    torch.manual_seed(8)
    accumulate(lambda part: model(*part), parts, objective_of({}))
    assert not torch.allclose(gradients(model)["image_tower.0.weight"], expected["image_tower.0.weight"])


def test_random_numbers_go_on_where_they_were() -> None:
    parts = split(0, 2)
    in_parts(towers(), parts, {})
    after = torch.rand(3)
    torch.manual_seed(7)
    model = towers()
    torch.manual_seed(7)
    with torch.no_grad():
        for part in parts:
            model(*part)
    assert torch.equal(torch.rand(3), after)


def test_no_micro_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        accumulate(lambda part: part, [], objective_of({}))


def on_rank(rank: int, world: int, tree: dict[str, Any], wrapper: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of a wrapped model from micro-batches of two."""
    towers_of_rank = towers()
    model: nn.Module = towers_of_rank
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    elif wrapper == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        fully_shard(towers_of_rank.image_tower, mesh=mesh)
        # FSDP2 refuses scalars: the scale is everybody's, and its gradient is averaged like those of a loss's plugs.
        fully_shard(model, mesh=mesh, ignored_params={towers_of_rank.logit_scale})
    torch.manual_seed(100 + rank)
    result = accumulate(
        lambda part: model(*part), split(rank, 2), objective_of(tree), synchronised=gradient_sync(model)
    )
    if wrapper == "fsdp2":
        average_gradients([towers_of_rank.logit_scale])
    return result, gradients(model)


def expected_of(rank: int, world: int, tree: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by one pass over this rank's rows, gradients averaged by hand."""
    model = towers()
    torch.manual_seed(100 + rank)
    outputs = [model(*part) for part in split(rank, 2)]
    features = {name: torch.cat([o[name] for o in outputs]) for name in ("image_features", "text_features")}
    total, result = objective_of(tree)(features | {"logit_scale": outputs[0]["logit_scale"]})
    total.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= world
    return result, gradients(model)


GROUPED = {"contrastive": {"gather": {"scope": "group", "group_size": 2}}}


@pytest.mark.distributed
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("world", "tree"),
    [
        (2, TREES[0]),
        (2, TREES[1]),
        (2, TREES[2]),
        (2, {"contrastive": {"gather": {"form": "two_sided"}}}),
        (4, GROUPED),
    ],
    ids=["softmax", "sigmoid", "plugs", "two-sided", "grouped"],
)
def test_micro_batches_on_ranks(world: int, tree: dict[str, Any], wrapper: str) -> None:
    found = run_ranks(on_rank, world, world, tree, wrapper)
    expected = run_ranks(expected_of, world, world, tree)
    for (loss, parts), (right_loss, right) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, right_loss, atol=1e-13, rtol=1e-13)
        torch.testing.assert_close(parts, right, atol=1e-13, rtol=1e-10)


# --- DeepSpeed, where it is installed ----------------------------------------------------------------------------


class TwoTowersWithVectorScale(TwoTowers):
    """DeepSpeed's ZeRO refuses scalar parameters, too."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), 2.0))


def under_deepspeed(rank: int, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    os.environ["LOCAL_RANK"] = str(rank)
    torch.manual_seed(0)
    model = TwoTowersWithVectorScale()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
    )[0]
    parts = [(images.float(), texts.float()) for images, texts in split(rank, 2)]
    torch.manual_seed(100 + rank)
    accumulate(
        lambda part: engine(*part),
        parts,
        objective_of({}),
        synchronised=gradient_sync(engine),
        backward=engine.backward,
    )
    found = {name: safe_get_full_grad(parameter) for name, parameter in model.named_parameters()}
    return found, expected_of(rank, 2, {})[1]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_micro_batches_under_deepspeed(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for found, expected in run_ranks(ignoring_warnings, 2, stage):
        for name, right in expected.items():
            torch.testing.assert_close(found[name].double().view(right.shape), right, atol=1e-6, rtol=1e-5)


def ignoring_warnings(rank: int, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """DeepSpeed's imports warn of what they will lose one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return under_deepspeed(rank, stage)
