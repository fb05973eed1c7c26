"""LoRA changes nothing at the start, trains nothing else, and goes back into the weights it changed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.models import dual_encoder
from diptych.models.adapters.attention import UnpackedAttention, pack, unpack
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.merge import merged
from diptych.testing import TINY_MODEL

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a red fox", "two dogs & a cat", ""]


def build(*adapters: dict[str, Any], **keys: Any) -> DualEncoder:
    return dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"adapters": list(adapters)} | keys), seed=0)


def lora(**keys: Any) -> dict[str, Any]:
    return {"type": "lora", "rank": 2} | keys


def features(model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return model.encode_image(IMAGES), model.encode_text(model.tokenizer(TEXTS))


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def disturb(model: DualEncoder) -> DualEncoder:
    """As if it had learned: B is 0 at the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "causal", "boolean"])
def test_unpacked_attention_is_the_same_attention(batch_first: bool, mask: str | None) -> None:
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    nn.init.normal_(packed.in_proj_bias)
    above = torch.ones(5, 5, dtype=torch.bool).triu(1)
    masks = {None: None, "boolean": above, "causal": torch.zeros(5, 5).double().masked_fill(above, -torch.inf)}
    x = torch.randn(5, 5, 8, dtype=torch.double)
    expected = packed(x, x, x, need_weights=False, attn_mask=masks[mask])[0]
    found = UnpackedAttention(packed).double()
    torch.testing.assert_close(found(x, x, x, attn_mask=masks[mask])[0], expected)
    torch.testing.assert_close(found.packed().double()(x, x, x, attn_mask=masks[mask])[0], expected)


def test_packing_gives_back_every_weight() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    assert unpack(model) == 2
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    pack(model)
    assert model.state_dict().keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keys", [{}, {"dora": True}, {"rslora": True, "dropout": 0.5}])
def test_the_start_is_the_base_and_nothing_else_learns(keys: dict[str, Any]) -> None:
    base, tuned = build(), build(lora(**keys))
    for expected, found in zip(features(base), features(tuned), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    names = trained(tuned)
    assert all("lora_" in name for name in names)
    assert {name.split(".")[0] for name in names} == {"image_tower", "text_tower"}
    assert {name.split(".")[-4] for name in names if "lora_A" in name} == {
        "q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj",
    }  # fmt: skip


@pytest.mark.parametrize("keys", [{}, {"dora": True}, {"rslora": True}, {"tower": "text", "targets": ["q_proj"]}])
def test_merged_equals_unmerged_and_is_a_plain_model_again(keys: dict[str, Any]) -> None:
    base, tuned = build(), disturb(build(lora(**keys)))
    expected = features(tuned)
    assert not torch.allclose(expected[1], features(base)[1], atol=1e-3)
    whole = merged(tuned)
    for found, wanted in zip(features(whole), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert whole.state_dict().keys() == base.state_dict().keys()
    assert trained(whole) == trained(base)


def test_each_tower_has_its_own_rank_and_some_parameters_learn_beside_them() -> None:
    model = build(lora(tower="image", rank=3, targets=["v_proj"]), lora(tower="text", rank=1), unfrozen=["logit_scale"])
    ranks = {name.split(".")[0]: module.shape[0] for name, module in model.named_parameters() if "lora_A" in name}
    assert ranks == {"image_tower": 3, "text_tower": 1}
    assert "logit_scale" in trained(model)
    before = copy.deepcopy(model.state_dict())
    model.train()(IMAGES, model.tokenizer(TEXTS)).image_features.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= set(trained(model))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_regular_expression_names_layers() -> None:
    model = build(lora(tower="image", targets=[r"transformer\.resblocks\.0\.mlp\..*"]))
    assert {name.split(".")[4] for name in trained(model)} == {"mlp"}


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"targets": ["query"]}, "'query' is no linear layer of the image_tower · model.adapters: lora.targets"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), not 1.0"),
        ({"type": "lorra"}, "unknown type 'lorra'; did you mean 'lora'"),
    ],
)
def test_wrong_settings_are_one_line(adapter: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build(lora(**adapter))
    assert "\n" not in str(caught.value)


def test_what_would_learn_beside_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unfrozen names what learns beside adapters, and there are none"):
        build(unfrozen=["logit_scale"])
