"""Towers on other sizes: what a tower built for the size gives with the resampled embedding, and all else as it was."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.model import CustomTextCLIP, resize_pos_embed
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.towers.resize import accept_sizes, resampled

VIT = {"layers": 2, "width": 32, "patch_size": 8, "image_size": 64, "head_width": 16}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 96}
TEXT = {"context_length": 8, "width": 16, "heads": 2, "layers": 1, "vocab_size": 100}


def tower(**vision: Any) -> nn.Module:
    torch.manual_seed(0)
    return CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT).visual.eval()


def timm_tower(name: str, **vision: Any) -> nn.Module:
    pooling = {"timm_pool": "avg", "timm_proj": "linear"}
    return tower(**({"timm_model_name": name, "image_size": 224} | pooling | vision))


def pictures(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


def resized_by_open_clip(positions: Tensor, side: int) -> Tensor:
    state = {"visual.positional_embedding": positions}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(side, side))))
    return state["visual.positional_embedding"]


@pytest.mark.parametrize("size", [8, 24, 32, 56, 96])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_dropout": 0.5},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"pos_embed_type": "sin_cos_2d", "no_ln_pre": True},
        {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
@torch.no_grad()
def test_a_vision_transformer_equals_one_built_for_the_size(changes: dict[str, Any], size: int) -> None:
    ours = tower(**VIT | changes)
    built = tower(**VIT | changes | {"image_size": size})
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    state["positional_embedding"] = resized_by_open_clip(state["positional_embedding"], size // 8)
    built.load_state_dict(state)
    accept_sizes(ours, [size])
    torch.testing.assert_close(ours(pictures(size)), built(pictures(size)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [32, 64, 128])
@torch.no_grad()
def test_a_resnet_equals_one_built_for_the_size(size: int) -> None:
    ours, built = tower(**RESNET), tower(**RESNET | {"image_size": size})
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    name = "attnpool.positional_embedding"
    state[name] = resized_by_open_clip(state[name], size // 32)
    built.load_state_dict(state)
    accept_sizes(ours, [size])
    torch.testing.assert_close(ours(pictures(size)), built(pictures(size)), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_timm_vision_transformer_equals_its_resized_self() -> None:
    ours = timm_tower("vit_tiny_patch16_224")
    built = copy.deepcopy(ours)
    built.trunk.set_input_size(img_size=112)
    accept_sizes(ours, [112])
    torch.testing.assert_close(ours(pictures(112)), built(pictures(112)), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_convolutions_need_nothing() -> None:
    ours = timm_tower("test_convnext", image_size=64)
    before = ours(pictures(32))
    accept_sizes(ours, [32])
    assert ours(pictures(32)).equal(before)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: tower(**VIT), 64),
        (lambda: tower(**VIT | {"image_size": 70}), 70),
        (lambda: tower(**RESNET), 96),
        (lambda: timm_tower("vit_tiny_patch16_224"), 224),
        (lambda: timm_tower("test_convnext", image_size=64), 64),
    ],
)
def test_the_own_size_is_untouched(build: Any, size: int) -> None:
    """Features, gradients, names and values bit for bit."""
    before, after = build(), build()
    accept_sizes(after, [32, size] if size < 224 else [112, size])
    for each in (before, after):
        each(pictures(size)).square().sum().backward()
    assert after(pictures(size)).equal(before(pictures(size)))
    theirs = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        assert parameter.equal(theirs[name])
        assert parameter.grad.equal(theirs[name].grad), name
    assert list(before.state_dict()) == list(after.state_dict())
    assert before.training == after.training


def test_the_gradient_reaches_every_place_of_the_full_grid() -> None:
    ours = tower(**VIT)
    accept_sizes(ours, [32])
    ours(pictures(32)).square().sum().backward()
    gradient = ours.positional_embedding.grad
    assert gradient.shape == (65, 32)
    assert bool((gradient != 0).any(1).all())


def test_resampling_has_the_gradient_of_interpolation() -> None:
    positions = torch.randn(1 + 25, 6, dtype=torch.float32, requires_grad=True)
    upstream = torch.randn(1 + 9, 6)
    (ours,) = torch.autograd.grad(resampled(positions, (5, 5), (3, 3)), positions, upstream)
    (theirs,) = torch.autograd.grad(resized_by_open_clip(positions, 3), positions, upstream)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_low_precision_around_it_does_not_reach_the_resampling() -> None:
    positions = torch.randn(1 + 25, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = resampled(positions, (5, 5), (3, 3))
    assert found.equal(resampled(positions, (5, 5), (3, 3)))


@pytest.mark.parametrize("vision", [VIT, RESNET])
@torch.no_grad()
def test_a_deep_copy_has_its_own_embedding(vision: dict[str, Any]) -> None:
    ours = tower(**vision)
    size = vision["image_size"] - 32
    accept_sizes(ours, [size])
    before = ours(pictures(size))
    theirs = copy.deepcopy(ours)
    for name, parameter in theirs.named_parameters():
        if "positional_embedding" in name:
            parameter.zero_()
    assert ours(pictures(size)).equal(before)
    assert not theirs(pictures(size)).allclose(before)


def test_it_compiles_to_one_graph() -> None:
    ours = tower(**VIT)
    accept_sizes(ours, [32])
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for size in (32, 64):
        torch.testing.assert_close(compiled(pictures(size)), ours(pictures(size)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "size", "why"),
    [
        (lambda: tower(**VIT), 20, "no multiple of the patch size, 8"),
        (lambda: timm_tower("vit_tiny_patch16_224"), 100, "divisible by patch size"),
        (lambda: timm_tower("swin_tiny_patch4_window7_224"), 112, "doesn't match model"),
        (lambda: timm_tower("eva02_tiny_patch14_224"), 112, "must match"),
    ],
)
def test_what_a_tower_does_not_take_is_refused(build: Any, size: int, why: str) -> None:
    ours = build().train()
    with pytest.raises(ConfigError, match=rf"no pictures of {size} x {size} pixels \(.*{why}.*stages") as problem:
        accept_sizes(ours, [size])
    assert "\n" not in str(problem.value)
    assert ours.training
