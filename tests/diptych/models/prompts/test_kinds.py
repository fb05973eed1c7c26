"""Each kind of prompts against its paper's formula, written out in loops."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.config import from_tree
from diptych.encoder import ModelEncoder
from diptych.errors import ConfigError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.prompts.splice import SLOT, slotted, spliced, word_vectors
from diptych.testing import TINY_MODEL

NAMES = ["red fox", "cat", "guinea pig"]
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TWO_LAYERS = {
    "towers": TINY_MODEL["towers"] | {part: TINY_MODEL["towers"][part] | {"layers": 2} for part in ("vision", "text")}
}


def build(kind: str, **keys: Any) -> DualEncoder:
    adapter = {"type": kind, "classes": NAMES} | keys
    model = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"adapters": [adapter]}), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as if it had learned: much starts at 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def images() -> Tensor:
    return F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(2)), dim=-1)


def text(model: DualEncoder, prompt: str, vectors: Tensor) -> Tensor:
    """The feature of one prompt with some vectors."""
    found = spliced(model.text_tower, slotted(model.tokenizer, [prompt]), vectors[None])[0]
    return F.normalize(found.float(), dim=-1)


def front(count: int, name: str) -> str:
    return f"{' '.join([SLOT] * count)} {name}."


def test_conditional_context_moves_vectors_by_the_picture() -> None:
    model, x = build("conditional_context", length=2), images()
    prompts = model.class_prompts
    found = model.read_classes(x).features
    for row in range(3):
        shift = prompts.meta_net[2](F.relu(prompts.meta_net[0](x[row])))
        for column, name in enumerate(NAMES):
            expected = text(model, front(2, name), prompts.context.weight + shift)
            torch.testing.assert_close(found[row, column], expected, atol=1e-6, rtol=0)
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_compositional_composes_unseen_pairs_from_learned_words() -> None:
    keys = {"attributes": ["red", "small guinea"], "objects": ["fox", "pig"], "pair": "{object}: {attribute}"}
    model = build("compositional", classes=["fox: red", "pig: small guinea"], **keys).eval()
    prompts = model.class_prompts
    found = model.read_classes(images(), ["pig: red", "fox: red"]).features
    for row, thing in enumerate((1, 0)):
        vectors = torch.stack([prompts.attributes.weight[0], prompts.objects.weight[thing]])
        torch.testing.assert_close(found[row], text(model, f"a photo of {SLOT} {SLOT}", vectors), atol=1e-6, rtol=0)
    dropped = model.train().read_classes(images(), ["pig: red"]).features
    assert not torch.allclose(dropped[0], found[0], atol=1e-4)


def test_compositional_starts_from_the_words_own_mean() -> None:
    adapter = {
        "type": "compositional",
        "classes": ["big fox", "red fox"],
        "attributes": ["big", "red"],
        "objects": ["fox"],
    }
    model = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"adapters": [adapter]}), seed=0).eval()
    plain = model.encode_text(model.tokenizer(["a photo of red fox"]))
    torch.testing.assert_close(model.read_classes(images(), ["red fox"]).features, plain, atol=1e-6, rtol=0)
    assert len(word_vectors(model.text_tower, model.tokenizer, "guinea pig")) == 2


def test_mixture_mixes_logits_of_the_chosen_prompts() -> None:
    templates = [["a photo of a {}.", "an image of {}."], ["a drawing of {}."], ["the {} here."]]
    model, x = build("mixture", templates=templates, top=2), images()
    prompts, scale = model.class_prompts, float(model.logit_scale.exp())
    found = model.train().read_classes(x)
    soft = torch.stack(
        [torch.stack([text(model, front(len(c.weight), n), c.weight) for n in NAMES]) for c in prompts.contexts]
    )
    hard = torch.stack(
        [
            torch.stack(
                [
                    F.normalize(model.encode_text(model.tokenizer([t.format(n) for t in g])).mean(0), dim=-1)
                    for n in NAMES
                ]
            )
            for g in templates
        ]
    )
    logits = found.logits(torch.tensor(scale))
    for row in range(3):
        scores = prompts.router.weight @ x[row]
        first, second = scores.argsort(descending=True)[:2].tolist()
        shares = scores[[first, second]].softmax(0)
        expected = shares[0] * scale * soft[first] @ x[row] + shares[1] * scale * soft[second] @ x[row]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-5)
        wanted = torch.stack([scale * x[row] @ hard[g].mean(0) for g in range(3)]).softmax(0)
        gate = (wanted * (wanted.log() - scores.log_softmax(0))).sum()
        near = sum(-(scale * soft[g, c] @ hard[g].T).log_softmax(0)[c] for g in range(3) for c in range(3)) / 9
        torch.testing.assert_close(found.losses[row], gate + near, atol=1e-4, rtol=1e-4)
    assert model.eval().read_classes(x).losses is None


def test_class_aware_vectors_come_from_names_and_pictures_look_at_classes() -> None:
    model, x = build("class_aware", length=2), images()
    prompts = model.class_prompts
    found = model.read_classes(x)
    classes = []
    for name in NAMES:
        plain = model.encode_text(model.tokenizer([f"a photo of a {name}."]))[0]
        vectors = prompts.context.weight + (prompts.generator.weight @ plain).view(2, -1)
        classes.append(text(model, front(2, name), vectors))
    features = torch.stack(classes)
    torch.testing.assert_close(found.features, features, atol=1e-6, rtol=0)
    for row in range(3):
        query = prompts.query.weight @ x[row]
        share = torch.stack([query @ (prompts.key.weight @ one) / 4 for one in features]).softmax(0)
        mixed = sum(share[c] * (prompts.value.weight @ features[c]) for c in range(3))
        expected = F.normalize(x[row] + prompts.out.weight @ mixed, dim=-1)
        torch.testing.assert_close(found.image_features[row], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["conditional_context", "mixture", "class_aware"])
def test_an_encoder_compares_with_what_depends_on_the_picture(kind: str) -> None:
    adapter = {"type": kind, "classes": NAMES} | ({"length": 2} if kind != "mixture" else {})
    model = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"adapters": [adapter]}), seed=0).eval()
    pictures, classes = ModelEncoder(model).read_classes(images(), ["a dog", "red fox"])
    expected = model.read_classes(images(), ["a dog", "red fox"]).logits(torch.ones(()))
    torch.testing.assert_close(pictures @ classes.T, expected.detach())


def tokens(tower: str, **keys: Any) -> DualEncoder:
    adapter = {"type": "layer_tokens", "tower": tower, "length": 3} | keys
    return dual_encoder.build(from_tree(ModelConfig, TWO_LAYERS | {"adapters": [adapter]}), seed=0).eval()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_tokens_of_layers_are_seen_and_drop_out(tower: str) -> None:
    model = tokens(tower)
    base = dual_encoder.build(from_tree(ModelConfig, TWO_LAYERS), seed=0).eval()
    encode = model.encode_image if tower == "image" else model.encode_text
    inputs = IMAGES if tower == "image" else model.tokenizer(["a red fox", "cat"])
    plain = (base.encode_image if tower == "image" else base.encode_text)(inputs)
    found = encode(inputs)
    assert found.shape == plain.shape
    assert not torch.allclose(found, plain, atol=1e-4)
    found.square().mul(torch.arange(16)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        f"{tower}_tower.layer_tokens.tokens.weight"
    ]
    assert getattr(model, f"{tower}_tower").layer_tokens.tokens.weight.grad.abs().amax(1).min() > 0


def test_tokens_of_layers_are_ordinary_keys_of_attention() -> None:
    """One layer, one head, written out."""
    tree = {"towers": TWO_LAYERS["towers"] | {"vision": TWO_LAYERS["towers"]["vision"] | {"head_width": 32}}}
    adapter = {"type": "layer_tokens", "tower": "image", "length": 2}
    model = dual_encoder.build(from_tree(ModelConfig, tree | {"adapters": [adapter]}), seed=0).eval()
    tower = model.image_tower
    block, states = tower.transformer.resblocks[0], torch.randn(1, 5, 32)
    x = torch.cat([states, tower.layer_tokens.tokens.weight[None, :2]], 1)
    q, k, v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    x = x + block.attn.out_proj((q @ k.transpose(1, 2) / 32**0.5).softmax(-1) @ v)
    expected = (x + block.mlp(block.ln_2(x)))[:, :5]
    torch.testing.assert_close(block(states), expected, atol=1e-5, rtol=1e-5)


def test_words_do_not_see_what_follows_though_all_see_the_tokens() -> None:
    model = tokens("text", length=2)
    block = model.text_tower.transformer.resblocks[0]
    states, mask = torch.randn(1, 4, 32), model.text_tower.attn_mask[:4, :4]
    changed = states.clone()
    changed[:, 2:] += 1
    before, after = block(states, attn_mask=mask), block(changed, attn_mask=mask)
    assert torch.equal(before[:, :2], after[:, :2])
    with torch.no_grad():
        model.text_tower.layer_tokens.tokens.weight.add_(torch.randn(4, 32))
    assert not torch.allclose(block(states, attn_mask=mask)[:, 0], before[:, 0], atol=1e-4)


def test_a_copy_has_tokens_of_its_own() -> None:
    model = tokens("text")
    twin = copy.deepcopy(model)
    before = model.encode_text(model.tokenizer(["cat"]))
    with torch.no_grad():
        twin.text_tower.layer_tokens.tokens.weight.add_(torch.randn(6, 32))
    assert model.encode_text(model.tokenizer(["cat"])).equal(before)
    assert not twin.encode_text(model.tokenizer(["cat"])).equal(before)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"type": "conditional_context", "classes": NAMES, "per_class": True}, "leave per_class out"),
        ({"type": "compositional", "classes": NAMES}, "attributes and objects must each name at least one"),
        (
            {"type": "compositional", "classes": NAMES, "attributes": ["red"], "objects": ["fox"]},
            "class 'cat' is no pair of an attribute and an object",
        ),
        ({"type": "mixture", "classes": NAMES, "top": 3}, "top must lie between 1 and the number of groups, not 3"),
        ({"type": "mixture", "classes": NAMES, "templates": [["{}"], ["here"]]}, "each template with {} for the name"),
        ({"type": "layer_tokens", "layers": 3}, "3 layers, and the tower has 2"),
        ({"type": "layer_tokens", "length": 0}, "length and layers must be at least 1"),
    ],
)
def test_wrong_settings_are_one_line(adapter: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        dual_encoder.build(from_tree(ModelConfig, TWO_LAYERS | {"adapters": [adapter]}), seed=0)
    assert "\n" not in str(caught.value)


def test_a_tower_without_such_layers_is_refused() -> None:
    vision = {"timm_model_name": "test_convnext2", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    towers = {"type": "open_clip", "embed_dim": 16, "vision": vision, "text": TINY_MODEL["towers"]["text"]}
    adapter = {"type": "layer_tokens", "tower": "image"}
    with pytest.raises(ConfigError, match=r"the image tower \(TimmModel\) is no transformer of layers of one width"):
        dual_encoder.build(from_tree(ModelConfig, {"towers": towers, "adapters": [adapter]}), seed=0)
