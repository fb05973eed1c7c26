"""Vectors in the places of words."""

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
from diptych.models.prompts.splice import SLOT, slotted, spliced, vocabulary, word_vectors
from diptych.testing import TINY_MODEL

NAMES = ["red fox", "cat", "very small guinea pig"]
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2, 0, 0])


def build(**keys: Any) -> DualEncoder:
    adapter = {"type": "context", "classes": NAMES, "length": 4} | keys
    if adapter["type"] == "class_names":
        del adapter["length"]
    tree = TINY_MODEL | {"adapters": [adapter], "unfrozen": ["logit_scale"]}
    return dual_encoder.build(from_tree(ModelConfig, tree), seed=0)


def read(model: DualEncoder, names: list[str] = NAMES) -> torch.Tensor:
    return model.read_classes(torch.zeros(1, 16), names).features


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize(
    ("position", "words", "template"),
    [
        ("front", "a photo of a", "a photo of a {}."),
        ("end", "in the red snow", "{} in the red snow."),
        ("middle", "a photo in snow", "a photo {} in snow."),
    ],
)
def test_started_from_words_it_is_the_plain_prompt(position: str, words: str, template: str, per_class: bool) -> None:
    model = build(words=words, position=position, per_class=per_class)
    expected = model.encode_text(model.tokenizer([template.format(name) for name in NAMES]))
    torch.testing.assert_close(read(model), expected, atol=1e-6, rtol=0)


def test_a_vector_stands_where_a_word_stood() -> None:
    """The same features as from the tower with that vector in its table of words."""
    model = build(length=1)
    vector = model.class_prompts.context.weight.detach().clone()
    tower, tokens = model.text_tower, model.tokenizer(["seven cat."])
    place = int(tokens[0, 1])
    with torch.no_grad():
        vocabulary(tower).weight[place] = vector[0]
    torch.testing.assert_close(read(model, ["cat", "fox"])[:1], model.encode_text(tokens), atol=1e-6, rtol=0)


def test_words_have_their_own_vectors() -> None:
    model = build()
    found = word_vectors(model.text_tower, model.tokenizer, "red fox")
    expected = vocabulary(model.text_tower)(model.tokenizer(["red fox"])[0, 1:3])
    assert found.equal(expected)


def test_only_the_vectors_learn() -> None:
    model = build().train()
    found = model(IMAGES, model.tokenizer(["x"] * 3), labels=LABELS)
    F.cross_entropy(found.class_logits, LABELS).backward()
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_gradient == ["logit_scale", "class_prompts.context.weight"]
    assert model.class_prompts.context.weight.grad.abs().min(1).values.min() > 0


def test_logits_and_texts_are_those_of_the_classes() -> None:
    model = build()
    found, classes = model(IMAGES, model.tokenizer(["x"] * 3), labels=LABELS), read(model)
    images = model.encode_image(IMAGES)
    torch.testing.assert_close(found.class_logits, model.logit_scale.exp() * images @ classes.T)
    torch.testing.assert_close(found.text_features, classes[LABELS])
    assert found.prompt_losses is None


def test_other_classes_are_read_with_the_same_vectors() -> None:
    shared, own = build(), build(per_class=True)
    assert read(shared, ["blue whale"]).shape == (1, 16)
    with pytest.raises(ConfigError, match="each class has vectors of its own, others have none"):
        read(own, ["blue whale"])
    assert own.class_prompts.context.weight.shape == (12, 32)


def test_an_encoder_compares_pictures_with_prompts() -> None:
    encoder = ModelEncoder(build())
    pictures, classes = encoder.read_classes(torch.eye(16)[:5], NAMES)
    assert pictures.equal(torch.eye(16)[:5])
    assert classes.equal(read(encoder.model).detach())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"length": 40}, r"does not fit into 16 tokens · model\.adapters · use fewer context vectors"),
        ({"classes": ["a"]}, r"1 classes · model\.adapters: classes · there must be two"),
        ({"classes": ["a", "b", "a"]}, "'a' stands there twice"),
        ({"classes": "nowhere.txt"}, "not readable .*nowhere.txt"),
        ({"length": 0}, "length must be at least 1, not 0"),
        ({"words": " "}, "no token in ' '"),
    ],
)
def test_wrong_settings_are_one_line(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build(**keys)
    assert "\n" not in str(caught.value)


def test_prompts_are_no_weights() -> None:
    with pytest.raises(ConfigError, match="what 'context' learned is no change of the model's weights"):
        merged(build())


def test_one_kind_of_prompts() -> None:
    one = {"type": "context", "classes": NAMES, "length": 4}
    with pytest.raises(ConfigError, match="the model has prompts of classes already"):
        dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"adapters": [one, one]}), seed=0)


def test_names_alone_are_templates() -> None:
    model = build(type="class_names", templates=["a {}.", "the {}"])
    prompts = [template.format(name) for name in NAMES for template in ("a {}.", "the {}")]
    expected = F.normalize(model.encode_text(model.tokenizer(prompts)).view(3, 2, -1).mean(1), dim=-1)
    torch.testing.assert_close(read(model), expected)


def test_slots_are_found_whatever_the_words() -> None:
    tokenizer = build().tokenizer
    found = slotted(tokenizer, [f"{SLOT} x {SLOT} a!", f"a {SLOT} {SLOT}"])
    assert found.places.tolist() == [[1, 3], [2, 3]]
    tower = build().text_tower
    again = spliced(tower, found, vocabulary(tower)(found.tokens.gather(1, found.places)))
    torch.testing.assert_close(again, tower(found.tokens))
