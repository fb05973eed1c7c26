"""Prompts that names make, and pictures that look at them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.encoder import ModelEncoder
from diptych.errors import ConfigError
from diptych.models.dual_encoder import DualEncoder
from diptych.testing import feature_with_vectors, tiny_tuned

NAMES = ["red fox", "cat", "guinea pig"]
PICTURES = torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 1, 0])
CUES = ["name", "name_and_picture"]


def build(**keys: Any) -> DualEncoder:
    return tiny_tuned({"type": "class_aware", "classes": NAMES, "words": "in the", "reduction": 2} | keys)


def learned(**keys: Any) -> DualEncoder:
    model = build(**keys)
    torch.manual_seed(1)
    for parameter in model.class_prompts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("cue", CUES)
def test_at_the_start_nothing_is_changed(cue: str) -> None:
    model = build(cue=cue)
    found = model.read_classes(PICTURES)
    expected = model.encode_text(model.tokenizer([f"in the {name}." for name in NAMES]))
    torch.testing.assert_close(found.features, expected.expand_as(found.features), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.image_features, PICTURES)


@pytest.mark.parametrize("cue", CUES)
def test_features_are_those_of_the_formula(cue: str) -> None:
    model = learned(cue=cue)
    prompts = model.class_prompts
    names = [feature_with_vectors(model, f"a photo of a {name}.", {}) for name in NAMES]
    weights = {name: parameter.detach().double() for name, parameter in prompts.named_parameters()}

    def feature(number: int, picture: Tensor) -> Tensor:
        cue_of = names[number] * picture if cue == "name_and_picture" else names[number]
        hidden = (weights["meta_net.0.weight"] @ cue_of + weights["meta_net.0.bias"]).clamp(min=0)
        shift = weights["meta_net.2.weight"] @ hidden + weights["meta_net.2.bias"]
        vectors = dict(zip(("seven", "eight"), weights["context.weight"] + shift, strict=True))
        return feature_with_vectors(model, f"seven eight {NAMES[number]}.", vectors)

    found = model.read_classes(PICTURES)
    for row, picture in enumerate(PICTURES.double()):
        texts = [feature(number, picture) for number in range(3)]
        scores = [
            float((weights["query.weight"] @ picture) @ (weights["key.weight"] @ text)) / math.sqrt(16)
            for text in texts
        ]
        total = sum(math.exp(score) for score in scores)
        drawn = sum(math.exp(score) / total * text for score, text in zip(scores, texts, strict=True))
        expected = picture + weights["value.weight"] @ drawn
        own = found.features[row] if cue == "name_and_picture" else found.features
        torch.testing.assert_close(own.double(), torch.stack(texts), atol=1e-5, rtol=0)  # float32 towers
        torch.testing.assert_close(found.image_features[row].double(), expected / expected.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cue", CUES)
def test_all_that_is_added_learns(cue: str) -> None:
    model = learned(cue=cue)
    found = model(IMAGES, model.tokenizer(["x"] * 4), labels=LABELS)
    torch.nn.functional.cross_entropy(found.class_logits, LABELS).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.class_prompts.parameters())
    assert not any(p.grad is not None for tower in (model.image_tower, model.text_tower) for p in tower.parameters())


@pytest.mark.parametrize("cue", CUES)
def test_an_encoder_reads_classes_that_were_never_seen(cue: str) -> None:
    model = learned(cue=cue)
    rows, classes = ModelEncoder(model).read_classes(PICTURES, ["blue whale", "cat"])
    found = model.read_classes(PICTURES, ["blue whale", "cat"])
    torch.testing.assert_close(rows @ classes.T, found.logits(torch.tensor(1.0)).detach())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"length": 0}, "at least 1"),
        ({"template": "a photo"}, r"template must hold one \{\}"),
        ({"words": " "}, "no token"),
    ],
)
def test_wrong_settings_are_one_line(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(**keys)
