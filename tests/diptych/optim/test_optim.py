"""Schedules as functions of samples, groups by kind of parameter, AdamW against its paper's arithmetic."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import ModelConfig
from diptych.optim import optimizers
from diptych.optim.groups import split
from diptych.optim.optimizers import OptimConfig
from diptych.optim.schedules import ScheduleConfig, factor
from diptych.testing import TINY_MODEL, tiny_model

SHAPES = ("cosine", "constant", "inverse_sqrt", "cooldown")


def test_cosine_by_hand() -> None:
    config = ScheduleConfig(shape="cosine", warmup_samples=100, final_fraction=0.1)
    assert factor(config, 0, 1100) == 0
    assert factor(config, 50, 1100) == 0.5
    assert factor(config, 100, 1100) == 1
    assert factor(config, 600, 1100) == pytest.approx(0.55)
    assert factor(config, 1100, 1100) == pytest.approx(0.1)


def test_cooldown_by_hand() -> None:
    config = ScheduleConfig(shape="cooldown", cooldown_fraction=0.25)
    assert factor(config, 0, 1000) == 1
    assert factor(config, 750, 1000) == 1
    assert factor(config, 875, 1000) == pytest.approx(0.5)
    assert factor(config, 1000, 1000) == 0


def test_inverse_sqrt_by_hand() -> None:
    config = ScheduleConfig(shape="inverse_sqrt", warmup_samples=100)
    assert factor(config, 400, 10_000) == pytest.approx(0.5)
    assert factor(config, 10_000, 10_000) == pytest.approx(0.1)


@given(st.sampled_from(SHAPES), st.integers(0, 500), st.integers(1, 2000), st.floats(0, 1), st.data())
def test_every_schedule_rises_then_never_rises_again(
    shape: str, warmup: int, total: int, final: float, data: st.DataObject
) -> None:
    config = ScheduleConfig(shape=shape, warmup_samples=warmup, final_fraction=final)  # type: ignore[arg-type]
    earlier, later = sorted(data.draw(st.lists(st.integers(0, total), min_size=2, max_size=2)))
    first, second = factor(config, earlier, total), factor(config, later, total)
    assert 0 <= first <= 1
    assert 0 <= second <= 1
    if later <= warmup:
        assert first <= second
    if earlier >= warmup:
        assert first >= second - 1e-12


def test_what_decays_and_what_does_not() -> None:
    model = dual_encoder.build(tiny_model(), seed=0)
    groups = {group.name: [name for name, _ in group.parameters] for group in split(model)}
    decaying, plain = set(groups["decay"]), set(groups["plain"])
    assert decaying | plain == {name for name, _ in model.named_parameters()}
    assert not decaying & plain
    assert {"logit_scale", "text_tower.token_embedding.weight", "text_tower.positional_embedding"} <= plain
    assert all(not name.endswith("bias") and ".ln_" not in name for name in decaying)
    assert {name for name in plain if name.endswith(("_proj.weight", "fc.weight"))} == set()


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad = False
    assert [name for group in split(model) for name, _ in group.parameters] == ["weight"]


def test_one_step_of_adamw_is_the_papers() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    weight, bias = model.weight.detach().double().clone(), model.bias.detach().double().clone()
    config = OptimConfig(peak_lr=0.1, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.2)
    optimizer = optimizers.build(config, model)
    optimizers.set_lr(optimizer, 0.05)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    for before, parameter, decay in ((weight, model.weight, 0.2), (bias, model.bias, 0.0)):
        gradient = parameter.grad.double()  # type: ignore[union-attr]
        # arXiv:1711.05101, algorithm 2, first step: the bias-corrected averages are the gradient and its square.
        expected = before * (1 - 0.05 * decay) - 0.05 * gradient / (gradient.abs() + 1e-6)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [{"peak_lr": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimConfig(**bad)  # type: ignore[arg-type]
    assert math.isclose(OptimConfig().peak_lr, 1e-3)


def test_rates_by_the_beginning_of_a_name() -> None:
    model = dual_encoder.build(tiny_model(), seed=0)
    rates = {"text_tower": 0.1, "text_tower.token_embedding": 0.5, "logit_scale": 3.0}
    optimizer = optimizers.build(OptimConfig(rates=rates), model)
    optimizers.set_lr(optimizer, 2.0)
    found = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, lr in found.items():
        expected = 0.2 if name.startswith("text_tower.") else 2.0
        expected = {"text_tower.token_embedding.weight": 1.0, "logit_scale": 6.0}.get(name, expected)
        assert lr == pytest.approx(expected), name
    with pytest.raises(ConfigError, match=r"begins with 'text_towr'.*did you mean 'text_tower'"):
        optimizers.build(OptimConfig(rates={"text_towr": 0.1}), model)


def test_layers_learn_slower_the_deeper_they_lie() -> None:
    towers = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY_MODEL["towers"].items()}
    towers["vision"]["layers"] = 3
    model = dual_encoder.build(from_tree(ModelConfig, {"towers": towers}), seed=0)
    groups = split(model, layer_decay=0.5)
    rates = {name: group.rate for group in groups for name, _ in group.parameters}
    blocks = [rates[f"image_tower.transformer.resblocks.{i}.mlp.c_fc.weight"] for i in range(3)]
    assert blocks == [0.25, 0.5, 1.0]
    assert rates["image_tower.conv1.weight"] == 0.125
    assert rates["image_tower.proj"] == rates["image_tower.ln_post.weight"] == 1.0
    assert rates["text_tower.token_embedding.weight"] == 0.5  # one layer
    assert rates["logit_scale"] == 1.0


def test_muon_takes_the_matrices_of_layers_and_keeps_its_state() -> None:
    model = dual_encoder.build(tiny_model(), seed=0)
    config = OptimConfig(algorithm="muon", peak_lr=1e-2, rates={"text_tower": 0.5})
    optimizer = optimizers.build(config, model)
    assert isinstance(optimizer, optimizers.Together)
    muon = [name for group in optimizer.parts[0].param_groups for name in group["names"]]
    assert muon
    assert all("resblocks" in name and name.endswith("weight") for name in muon)
    every = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())

    def update(with_one: optimizers.Optimizer, of: nn.Module, seed: int) -> None:
        torch.manual_seed(seed)
        for _, parameter in sorted(of.named_parameters()):
            parameter.grad = torch.randn_like(parameter)
        optimizers.step_unless(with_one, torch.zeros((), dtype=torch.bool))

    update(optimizer, model, 1)
    twin = dual_encoder.build(tiny_model(), seed=0)
    twin.load_state_dict(model.state_dict())
    other = optimizers.build(config, twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    update(optimizer, model, 2)
    update(other, twin, 2)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert ours.equal(theirs), name
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizers.step_unless(optimizer, torch.ones((), dtype=torch.bool))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
