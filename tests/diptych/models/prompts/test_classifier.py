"""Rows that begin as the classes' names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diptych.config import from_tree
from diptych.encoder import ModelEncoder
from diptych.errors import ConfigError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.merge import merged
from diptych.testing import TINY_MODEL

NAMES = ["red fox", "cat", "very small guinea pig"]
TEMPLATES = ["a {}.", "the {} here"]
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 0])


def build(unfrozen: tuple[str, ...] = (), **keys: Any) -> DualEncoder:
    adapter = {"type": "classifier", "classes": NAMES, "templates": TEMPLATES} | keys
    return dual_encoder.build(
        from_tree(ModelConfig, TINY_MODEL | {"adapters": [adapter], "unfrozen": unfrozen}), seed=0
    )


def zero_shot(model: DualEncoder, names: list[str]) -> torch.Tensor:
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    with torch.no_grad():
        return F.normalize(model.encode_text(model.tokenizer(prompts)).view(len(names), 2, -1).mean(1), dim=-1)


def test_it_begins_as_zero_shot() -> None:
    model = build()
    pictures, classes = ModelEncoder(model).read_classes(model.encode_image(IMAGES).detach(), NAMES)
    expected = model.encode_image(IMAGES) @ zero_shot(model, NAMES).T
    torch.testing.assert_close(pictures @ classes.T, expected, atol=1e-6, rtol=0)
    assert model.class_prompts.rows.weight.shape == (3, 16)
    assert not classes.requires_grad


def test_logits_are_those_of_the_rows_in_float64() -> None:
    model = build().train()
    torch.nn.init.normal_(model.class_prompts.rows.weight, generator=torch.Generator().manual_seed(0))
    found = model(IMAGES, model.tokenizer(["x"] * 3), labels=LABELS)
    rows, images = model.class_prompts.rows.weight.double(), model.encode_image(IMAGES).double()
    torch.testing.assert_close(
        found.class_logits.double(), model.logit_scale.double().exp() * images @ rows.T, atol=1e-4, rtol=1e-5
    )  # float32 products, logits of tens
    expected = F.cross_entropy(model.logit_scale.double().exp() * images @ rows.T, LABELS)
    (slope,) = torch.autograd.grad(F.cross_entropy(found.class_logits, LABELS), model.class_prompts.rows.weight)
    (wanted,) = torch.autograd.grad(expected, rows)
    torch.testing.assert_close(slope.double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("unfrozen", [(), ("image_tower",)])
def test_only_rows_and_what_is_unfrozen_learn(unfrozen: tuple[str, ...]) -> None:
    model = build(unfrozen).train()
    found = model(IMAGES, model.tokenizer(["x"] * 3), labels=LABELS)
    F.cross_entropy(found.class_logits, LABELS).backward()
    learned = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {"class_prompts", *unfrozen}


def test_known_names_are_rows_and_others_are_read() -> None:
    model = build()
    rows = model.class_prompts.rows.weight
    torch.nn.init.normal_(rows)
    pictures = torch.eye(16)[:2]
    assert model.read_classes(pictures, NAMES).features.equal(rows)
    assert model.read_classes(pictures, ["cat", "red fox"]).features.equal(rows[[1, 0]])
    strange = ["cat", "blue whale"]
    torch.testing.assert_close(model.read_classes(pictures, strange).features, zero_shot(model, strange))


def test_towers_stay_as_they_were_built() -> None:
    plain = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0)
    tuned = build().state_dict()
    assert all(value.equal(tuned[name]) for name, value in plain.state_dict().items())


def test_rows_are_no_weights_of_the_towers() -> None:
    with pytest.raises(ConfigError, match="what 'classifier' learned is no change of the model's weights"):
        merged(build())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"templates": []}, "templates must hold at least one"),
        ({"templates": ["a photo"]}, "each with {} for the name"),
        ({"classes": ["a"]}, r"1 classes · model\.adapters: classes"),
        ({"templates": ["x " * 20 + "{}"]}, "does not fit into 16 tokens"),
    ],
)
def test_wrong_settings_are_one_line(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build(**keys)
    assert "\n" not in str(caught.value)
