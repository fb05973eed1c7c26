"""Learned tokens in the layers of towers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.models import dual_encoder, speed
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.ema import Ema
from diptych.models.prompts.tokens import LayerTokens, entrance, install, widened
from diptych.models.speed import SpeedConfig
from diptych.models.towers.hf import ImageTower, Padding, TextTower
from diptych.testing import TINY_CAPTIONER, TINY_MODEL, tiny_tuned

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a red fox", "a very small guinea pig in snow", "cat"]


def layer_by_hand(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    """A layer of open_clip's transformer for one row [L, W], float64, head by head."""
    normed = F.layer_norm(x, x.shape[-1:], layer.ln_1.weight.double(), layer.ln_1.bias.double())
    attention, width = layer.attn, x.shape[-1]
    packed = normed @ attention.in_proj_weight.double().T + attention.in_proj_bias.double()
    heads = []
    for head in range(attention.num_heads):
        size = width // attention.num_heads
        rows = slice(head * size, (head + 1) * size)
        q, k, v = (packed[:, part * width : (part + 1) * width][:, rows] for part in range(3))
        heads.append(torch.softmax(q @ k.T / size**0.5 + mask, 1) @ v)
    x = x + torch.cat(heads, 1) @ attention.out_proj.weight.double().T + attention.out_proj.bias.double()
    normed = F.layer_norm(x, x.shape[-1:], layer.ln_2.weight.double(), layer.ln_2.bias.double())
    inner = F.gelu(normed @ layer.mlp.c_fc.weight.double().T + layer.mlp.c_fc.bias.double())
    return x + inner @ layer.mlp.c_proj.weight.double().T + layer.mlp.c_proj.bias.double()


def carried_by_hand(x: Tensor, layers: Any, tokens: list[Tensor], *, causal: bool) -> Tensor:
    """One row through all layers with tokens in front; where a layer has none of its own it keeps those that came."""
    count = 0
    for number, layer in enumerate(layers):
        if number < len(tokens):
            x, count = torch.cat([tokens[number], x[count:]]), len(tokens[number])
        elif len(tokens) > 1:  # deep ones are dropped behind the last layer that has any
            x, count = x[count:], 0
        blind = torch.full((len(x), len(x)), float("-inf"), dtype=torch.float64).triu(1)
        x = layer_by_hand(layer, x, blind if causal else torch.zeros_like(blind))
    return x[count:]


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@torch.no_grad()
def test_pictures_are_seen_as_in_the_paper(depth: str) -> None:
    model = tiny_tuned({"type": "visual_prompts", "length": 3, "depth": depth}, layers=3)
    tower, pixels = model.image_tower, model.normalised(IMAGES)
    learned = tower.learned_tokens.table.weight.double().split(3)
    assert len(learned) == (3 if depth == "deep" else 1)
    expected = []
    for row in tower._embeds(pixels).double():
        last = carried_by_hand(row, tower.transformer.resblocks, list(learned), causal=False)[0]
        normed = F.layer_norm(last, last.shape, tower.ln_post.weight.double(), tower.ln_post.bias.double())
        expected.append(normed @ tower.proj.double())
    torch.testing.assert_close(tower(pixels).double(), torch.stack(expected), atol=1e-5, rtol=0)  # float32 tower


@pytest.mark.parametrize("layers", [None, 2])
@torch.no_grad()
def test_words_are_read_behind_the_tokens(layers: int | None) -> None:
    model = tiny_tuned({"type": "text_tokens", "length": 2, "layers": layers}, layers=3)
    tower, tokens = model.text_tower, model.tokenizer(TEXTS)
    learned = tower.learned_tokens.table.weight.double().split(2)
    assert len(learned) == (layers or 3)
    expected = []
    for ids, row in zip(tokens, tower._embeds(tokens)[0].double(), strict=True):
        found = carried_by_hand(row, tower.transformer.resblocks, list(learned), causal=True)[int(ids.argmax())]
        normed = F.layer_norm(found, found.shape, tower.ln_final.weight.double(), tower.ln_final.bias.double())
        expected.append(normed @ tower.text_projection.double())
    torch.testing.assert_close(tower(tokens).double(), torch.stack(expected), atol=1e-5, rtol=0)  # float32 tower
    torch.testing.assert_close(tower(tokens[:, :10]).double(), torch.stack(expected), atol=1e-5, rtol=0)  # trimmed


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIZES | {
    "vocab_size": 20,
    "max_position_embeddings": 14,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
VISION = SIZES | {"image_size": 16, "patch_size": 8}


def clip() -> nn.Module:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))


def siglip() -> nn.Module:
    text = TEXT | {"projection_size": 32}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))


def altclip() -> nn.Module:
    text = TEXT | {"project_dim": 24}
    return transformers.AltCLIPModel(
        transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    )


IDS = torch.tensor([[1, 6, 7, 3, 0, 0], [1, 8, 9, 10, 11, 3], [1, 12, 3, 0, 0, 0]])  # one higher, as they travel


def learning(tower: nn.Module, example: Tensor) -> nn.Module:
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    found = entrance(tower, example, where="tower")
    install(tower, LayerTokens(torch.randn(4, found.width), 2), found.layers, example, where="tower")
    return tower.eval()


@pytest.mark.parametrize(
    ("make", "padding"),
    [
        (clip, Padding(1, masked=False, whole=False)),
        (clip, Padding(1, masked=True, whole=False)),
        (altclip, Padding(1, masked=True, whole=False)),
        (siglip, Padding(1, masked=False, whole=True)),
        (siglip, Padding(1, masked=True, whole=True)),
    ],
)
@torch.no_grad()
def test_transformers_texts_take_tokens_and_padding_stays_unseen(
    make: Callable[[], nn.Module], padding: Padding
) -> None:
    torch.manual_seed(0)
    tower = TextTower(make(), padding, 12)
    before = tower.eval()(IDS)
    learning(tower, IDS)
    found = tower(IDS)
    assert float((found - before).abs().max()) > 1e-2
    alone = torch.cat([tower(IDS[:1, :4]), tower(IDS[1:2]), tower(IDS[2:, :3])])
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("make", [clip, siglip])
@torch.no_grad()
def test_transformers_pictures_take_tokens(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    tower, pixels = ImageTower(make()), torch.randn(2, 3, 16, 16)
    learning(tower, pixels)
    found = tower(pixels)
    tower.learned_tokens.table.weight.neg_()
    assert float((found - tower(pixels)).abs().max()) > 1e-2


def test_a_mask_of_padding_alone_hides_it_from_the_tokens_too() -> None:
    see = torch.tensor([True, True, False])
    both = torch.tensor([[True] * 4 + [False]])
    assert widened(see.expand(2, 1, 3, 3), 2).equal(both.expand(2, 1, 5, 5))
    assert widened(see.expand(2, 1, 1, 3), 2).equal(both.expand(2, 1, 1, 5))
    causal = torch.full((3, 3), float("-inf")).triu(1)
    assert widened(causal, 2).equal(torch.full((5, 5), float("-inf")).triu(1))


def test_a_captioner_gives_its_own_tokens() -> None:
    towers = {**TINY_CAPTIONER["towers"]}
    for side in ("vision", "text"):
        towers[side] = towers[side] | {"layers": 2}
    adapters = [{"type": "text_tokens", "length": 2}, {"type": "visual_prompts", "length": 3}]
    config = from_tree(ModelConfig, {"towers": towers, "adapters": adapters})
    model, plain = (
        dual_encoder.build(config, seed=0),
        dual_encoder.build(from_tree(ModelConfig, {"towers": towers}), seed=0),
    )
    tokens = plain.tokenizer(TEXTS)
    assert model.next_word_logits(IMAGES, tokens).shape == plain.next_word_logits(IMAGES, tokens).shape
    trimmed = tokens[:, : int((tokens != 0).sum(1).max())]
    torch.testing.assert_close(model.encode_text(trimmed), model.encode_text(tokens))


def both(**keys: Any) -> DualEncoder:
    adapters = [{"type": "text_tokens", "length": 2} | keys, {"type": "visual_prompts", "length": 3} | keys]
    return tiny_tuned(*adapters, layers=2)


def test_tokens_alone_learn_and_their_pictures_and_texts_are_seen_in_training() -> None:
    model = both()
    found = model(IMAGES, model.tokenizer(TEXTS))
    (found.image_features @ found.text_features.T).diagonal().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(gradients) == ["image_tower.learned_tokens.table.weight", "text_tower.learned_tokens.table.weight"]
    assert all(bool((gradient.abs().amax(1) > 0).all()) for gradient in gradients.values())


@torch.no_grad()
def test_an_averaged_copy_has_tokens_of_its_own() -> None:
    model = both()
    copied = Ema(model, decay=0.9).model
    tokens = model.tokenizer(TEXTS)
    before = copied.encode_image(IMAGES), copied.encode_text(tokens)
    for tower in (model.image_tower, model.text_tower):
        tower.learned_tokens.table.weight.neg_()
    assert copied.encode_image(IMAGES).equal(before[0])
    assert copied.encode_text(tokens).equal(before[1])
    assert not torch.allclose(model.encode_image(IMAGES), before[0])
    copied.image_tower.learned_tokens.table.weight.neg_()
    torch.testing.assert_close(copied.encode_image(IMAGES), model.encode_image(IMAGES))


def test_activations_computed_again_change_nothing() -> None:
    gradients = []
    for again in (False, True):
        model = both()
        speed.prepare(model, SpeedConfig(checkpoint_activations=again))
        found = model(IMAGES, model.tokenizer(TEXTS))
        (found.image_features @ found.text_features.T).diagonal().sum().backward()
        gradients.append(model.image_tower.learned_tokens.table.weight.grad)
    torch.testing.assert_close(*gradients)


def test_dropout_is_of_training_alone() -> None:
    model = tiny_tuned({"type": "visual_prompts", "dropout": 0.5}, layers=2)
    assert not model.encode_image(IMAGES).equal(model.encode_image(IMAGES))
    assert model.eval().encode_image(IMAGES).equal(model.encode_image(IMAGES))


def test_prompts_of_classes_are_read_behind_text_tokens() -> None:
    context = {"type": "context", "classes": ["fox", "cat"], "words": "a photo of a"}
    model = tiny_tuned({"type": "text_tokens", "length": 2}, context, layers=2)
    expected = model.encode_text(model.tokenizer(["a photo of a fox.", "a photo of a cat."]))
    torch.testing.assert_close(model.read_classes(torch.zeros(1, 16)).features, expected, atol=1e-6, rtol=0)


def vision(**keys: Any) -> dict[str, Any]:
    towers = TINY_MODEL["towers"]
    return {"towers": towers | {"vision": {"image_size": 32} | keys}}


@pytest.mark.parametrize(
    ("tree", "adapter", "said"),
    [
        (
            TINY_MODEL,
            "text_tokens",
            "the text_tower .* has no layers that repeat and take tokens .* two layers or more",
        ),
        (TINY_MODEL, "visual_prompts", "the image_tower .* has no layers that repeat and take tokens"),
        (vision(layers=[1, 1, 1, 1], width=8), "visual_prompts", "has no layers that repeat and take tokens"),
        (vision(timm_model_name="test_convnext"), "visual_prompts", "has no layers that repeat and take tokens"),
    ],
)
def test_towers_that_take_no_tokens_are_one_line(tree: dict[str, Any], adapter: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        dual_encoder.build(from_tree(ModelConfig, tree | {"adapters": [{"type": adapter}]}), seed=0)
    assert "\n" not in str(caught.value)


class Rotary(nn.Module):
    """Layers that turn each token by its place: more tokens than places do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Sequential(nn.Linear(4, 4))) for _ in range(2))
        self.places = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            handle = layer.register_forward_pre_hook(lambda _, args: (args[0] * self.places,))
            x = layer(x)
            handle.remove()
        return x.mean(1)


def test_layers_that_take_no_more_tokens_are_one_line() -> None:
    tower, example = Rotary(), torch.zeros(2, 3, 4)
    found = entrance(tower, example, where="text_tower")
    with pytest.raises(ConfigError, match=r"the layers of the text_tower \(Rotary\) take no more tokens") as caught:
        install(tower, LayerTokens(torch.zeros(2, 4), 1), found.layers, example, where="text_tower")
    assert "\n" not in str(caught.value)


def test_a_timm_tower_takes_them() -> None:
    tree = vision(timm_model_name="test_vit", image_size=160) | {"adapters": [{"type": "visual_prompts", "length": 2}]}
    model = dual_encoder.build(from_tree(ModelConfig, tree), seed=0)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.image_tower.learned_tokens.table.weight.neg_()
    images = torch.zeros(1, 3, 160, 160, dtype=torch.uint8)
    assert not torch.allclose(model.encode_image(images), before.encode_image(images))


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ([{"type": "text_tokens", "layers": 3}], "the text_tower has 2 layers, not 3"),
        ([{"type": "text_tokens", "length": 0}], "length and layers must be at least 1"),
        ([{"type": "visual_prompts", "length": 0}], "length must be at least 1"),
        ([{"type": "visual_prompts", "dropout": 1.0}], r"dropout must lie in \[0, 1\)"),
        ([{"type": "visual_prompts"}] * 2, "the image_tower has learned tokens already"),
    ],
)
def test_wrong_settings_are_one_line(adapters: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_tuned(*adapters, layers=2)
