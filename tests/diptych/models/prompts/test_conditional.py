"""Context vectors that each picture shifts."""

import pytest
import torch
from torch import Tensor

from diptych.encoder import ModelEncoder
from diptych.errors import ConfigError
from diptych.models.dual_encoder import DualEncoder
from diptych.testing import feature_with_vectors, tiny_tuned

NAMES = ["red fox", "cat", "very small guinea pig"]
PICTURES = torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 1, 0])


def build(**keys: object) -> DualEncoder:
    return tiny_tuned({"type": "conditional_context", "classes": NAMES, "words": "in the", "reduction": 2} | keys)


def learned(model: DualEncoder) -> DualEncoder:
    """One whose network has learned something."""
    torch.manual_seed(1)
    for parameter in model.class_prompts.meta_net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_at_the_start_each_picture_reads_the_plain_prompts() -> None:
    model = build()
    found = model.read_classes(PICTURES).features
    expected = model.encode_text(model.tokenizer([f"in the {name}." for name in NAMES]))
    torch.testing.assert_close(found, expected.expand(4, -1, -1), atol=1e-6, rtol=0)


def test_features_are_those_of_the_formula() -> None:
    model = learned(build())
    prompts = model.class_prompts
    weights = {name: parameter.detach().double() for name, parameter in prompts.named_parameters()}
    first, second, context = weights["meta_net.0.weight"], weights["meta_net.2.weight"], weights["context.weight"]

    def feature(picture: Tensor, name: str) -> Tensor:
        hidden = (first @ picture + weights["meta_net.0.bias"]).clamp(min=0)
        shift = second @ hidden + weights["meta_net.2.bias"]
        return feature_with_vectors(
            model, f"seven eight {name}.", {"seven": context[0] + shift, "eight": context[1] + shift}
        )

    expected = torch.stack([torch.stack([feature(picture, name) for name in NAMES]) for picture in PICTURES.double()])
    found = model.read_classes(PICTURES)
    torch.testing.assert_close(found.features.double(), expected, atol=1e-5, rtol=0)  # float32 towers
    torch.testing.assert_close(found.features.norm(dim=2), torch.ones(4, 3))
    logits = torch.stack([row @ classes for row, classes in zip(expected, PICTURES.double(), strict=True)])
    torch.testing.assert_close(found.logits(torch.tensor(3.0)).double(), 3 * logits, atol=3e-5, rtol=0)


def test_all_that_is_added_learns() -> None:
    model = learned(build())
    found = model(IMAGES, model.tokenizer(["x"] * 4), labels=LABELS)
    torch.nn.functional.cross_entropy(found.class_logits, LABELS).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if name.startswith("class_prompts.")}
    assert all(float(p.grad.abs().max()) > 0 for p in model.class_prompts.parameters())
    torch.testing.assert_close(found.text_features, model.read_classes(found.image_features).features[range(4), LABELS])


def test_an_encoder_gives_scores_of_other_classes_too() -> None:
    model = learned(build())
    rows, classes = ModelEncoder(model).read_classes(PICTURES, ["blue whale", "cat"])
    expected = torch.einsum("bd,bcd->bc", PICTURES, model.read_classes(PICTURES, ["blue whale", "cat"]).features)
    torch.testing.assert_close(rows @ classes.T, expected.detach())


@pytest.mark.parametrize("keys", [{"length": 0}, {"reduction": 0}])
def test_wrong_settings_are_one_line(keys: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="length and reduction must be at least 1"):
        build(**keys)
