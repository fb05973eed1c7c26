"""Prompts of which each picture takes some."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.encoder import ModelEncoder
from diptych.errors import ConfigError
from diptych.models.dual_encoder import DualEncoder
from diptych.testing import feature_with_vectors, tiny_tuned

NAMES = ["red fox", "cat", "guinea pig"]
GROUPS = [["a photo of {}.", "a picture of {}."], ["{} in snow"], ["the {} here."]]
STAND_INS = [["seven eight nine {}."], ["{} seven eight"], ["seven {} eight."]]
PICTURES = torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 1, 0])


def build(**keys: Any) -> DualEncoder:
    model = tiny_tuned({"type": "mixture", "classes": NAMES, "groups": GROUPS} | keys)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.class_prompts.router.weight)
    return model


def soft(model: DualEncoder) -> Tensor:
    """Features [G, C, D] by the learned vectors, float64."""
    parts = model.class_prompts.context.weight.split([3, 2, 2])
    vectors = [dict(zip(("seven", "eight", "nine"), part, strict=False)) for part in parts]
    return torch.stack(
        [
            torch.stack([feature_with_vectors(model, text.replace("{}", name), words) for name in NAMES])
            for (text,), words in zip(STAND_INS, vectors, strict=True)
        ]
    )


def hard(model: DualEncoder) -> Tensor:
    """Features [G, C, D] by the templates, float64."""
    means = [
        [sum(feature_with_vectors(model, text.replace("{}", name), {}) for text in group) for name in NAMES]
        for group in GROUPS
    ]
    return torch.nn.functional.normalize(torch.stack([torch.stack(row) for row in means]), dim=2)


def routes(model: DualEncoder) -> Tensor:
    router = model.class_prompts.router
    return (PICTURES.double() @ router.weight.double().T + router.bias.double()).detach()


def test_each_prompt_starts_as_its_group_s_first_template() -> None:
    model = build(top_k=3)
    texts = model.read_classes(PICTURES).features.unflatten(1, (3, 16))
    for number, (template, *_) in enumerate(GROUPS):
        expected = model.encode_text(model.tokenizer([template.replace("{}", name) for name in NAMES]))
        torch.testing.assert_close(texts[:, number], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_logits_mix_the_prompts_that_a_picture_takes(top_k: int) -> None:
    model = build(top_k=top_k)
    torch.nn.init.normal_(model.class_prompts.context.weight, std=0.1)
    texts, expected = soft(model), torch.zeros(4, 3, dtype=torch.float64)
    for row, (picture, route) in enumerate(zip(PICTURES.double(), routes(model), strict=True)):
        taken = sorted(range(3), key=lambda group: -float(route[group]))[:top_k]
        weights = torch.softmax(route[taken], 0)
        for name in range(3):
            expected[row, name] = sum(w * (picture @ texts[g, name]) for w, g in zip(weights, taken, strict=True))
    found = model.read_classes(PICTURES).logits(torch.tensor(1.0))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)  # float32 towers


def test_losses_are_those_of_the_formula() -> None:
    model = build(gate_weight=0.7, text_weight=3.0)
    torch.nn.init.normal_(model.class_prompts.context.weight, std=0.1)
    texts, templates, expected = soft(model), hard(model), torch.zeros(4, 3, dtype=torch.float64)
    text_loss = sum(
        torch.logsumexp(templates[g] @ texts[g, c], 0) - templates[g, c] @ texts[g, c]
        for g in range(3)
        for c in range(3)
    )
    for row, (picture, route) in enumerate(zip(PICTURES.double(), routes(model), strict=True)):
        for name in range(3):
            near = torch.stack([picture @ templates[group, name] for group in range(3)])
            raised = [near[g] + 10 * (g in near.topk(2).indices.tolist()) for g in range(3)]
            target = torch.softmax(torch.stack(raised), 0)
            gate = -sum(target[g] * (route[g] - torch.logsumexp(route, 0)) for g in range(3))
            expected[row, name] = 0.7 * gate + 3.0 * text_loss / 9
    found = model.read_classes(PICTURES).losses
    torch.testing.assert_close(found.double(), expected, atol=3e-5, rtol=0)  # float32 towers, weights above one


def test_a_picture_is_asked_by_its_own_class_and_all_learns() -> None:
    model = build()
    found = model(IMAGES, model.tokenizer(["x"] * 4), labels=LABELS)
    losses = model.read_classes(model.encode_image(IMAGES)).losses
    torch.testing.assert_close(found.prompt_losses, losses[range(4), LABELS])
    (torch.nn.functional.cross_entropy(found.class_logits, LABELS) + found.prompt_losses.mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(gradients) == [
        "class_prompts.context.weight",
        "class_prompts.router.weight",
        "class_prompts.router.bias",
    ]
    assert all(bool((gradient != 0).any()) for gradient in gradients.values())


def test_templates_are_read_again_where_the_text_tower_learns() -> None:
    model = build()
    prompts, texts = model.class_prompts, ["a fox", "a cat"]
    assert prompts.fixed(model, texts) is prompts.fixed(model, texts)
    model.text_tower.requires_grad_()  # from some stage on
    assert prompts.fixed(model, texts) is not prompts.fixed(model, texts)


def test_an_encoder_reads_classes_that_were_never_seen_and_asks_nothing() -> None:
    model = build()
    rows, classes = ModelEncoder(model).read_classes(PICTURES, ["blue whale", "cat"])
    found = model.read_classes(PICTURES, ["blue whale", "cat"])
    assert found.losses is None
    torch.testing.assert_close(rows @ classes.T, found.logits(torch.tensor(1.0)).detach())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"groups": [["{}"], ["a {}"]]}, r"no word beside the name in '\{\}'"),
        ({"groups": [["a {}"], []]}, "at least one template each"),
        ({"groups": [["a fox"], ["a {}"]]}, r"templates with one \{\}"),
        ({"top_k": 4}, r"top_k must lie in \[1, 3\], the number of groups, not 4"),
        ({"groups": [["a {}", "x " * 20 + "{}"], ["the {}"]]}, "does not fit into 16 tokens"),
    ],
)
def test_wrong_settings_are_one_line(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build(**keys)
    assert "\n" not in str(caught.value)
