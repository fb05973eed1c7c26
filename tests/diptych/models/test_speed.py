"""Compiled layers and activations computed again: the same losses and gradients."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.models import dual_encoder, speed
from diptych.models.dual_encoder import ModelConfig
from diptych.models.speed import SpeedConfig
from diptych.testing import TINY_MODEL

TWO_LAYERS = {
    "towers": TINY_MODEL["towers"]
    | {"vision": TINY_MODEL["towers"]["vision"] | {"layers": 2}, "text": TINY_MODEL["towers"]["text"] | {"layers": 2}}
}
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def gradients(config: SpeedConfig, *lengths: int) -> list[Tensor]:
    model = dual_encoder.build(from_tree(ModelConfig, TWO_LAYERS), seed=0).train()
    names = [name for name, _ in model.named_parameters()]
    speed.prepare(model, config)
    assert [name for name, _ in model.named_parameters()] == names
    for length in lengths:
        tokens = torch.arange(4 * length).view(4, length) + 1
        found = model(IMAGES, tokens)
        logits = found.image_features @ found.text_features.T * found.logit_scale
        torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_activations_computed_again_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    import torch.utils.checkpoint as module

    whole = module._checkpoint_without_reentrant_generator

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return whole(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_checkpoint_without_reentrant_generator", counting)
    plain = gradients(SpeedConfig(), 5)
    assert not calls
    assert all(a.equal(b) for a, b in zip(plain, gradients(SpeedConfig(checkpoint_activations=True), 5), strict=True))
    assert len(calls) == 4  # layers of both towers


def test_what_stands_beside_the_towers_needs_no_layers() -> None:
    adapters = [{"type": "context", "classes": ["fox", "cat"], "length": 4}]
    model = dual_encoder.build(from_tree(ModelConfig, TWO_LAYERS | {"adapters": adapters}), seed=0)
    speed.prepare(model, SpeedConfig(checkpoint_activations=True))
    with pytest.raises(ConfigError, match="the image_tower has no layers that repeat"):
        speed.prepare(
            dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0), SpeedConfig(checkpoint_activations=True)
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_give_the_same_and_lengths_are_compiled_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.Module.compile", lambda self: _compile_eager(self))
    torch._dynamo.reset()
    plain = gradients(SpeedConfig(), 5, 9, 7, 11, 8)
    counters.clear()
    compiled = gradients(SpeedConfig(compile=True), 5, 9, 7, 11, 8)
    torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=1e-4)
    assert 2 <= counters["stats"]["unique_graphs"] <= 4  # pictures, captions, captions of any length


def _compile_eager(module: torch.nn.Module) -> None:
    module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")
