"""Attributes and objects that are put together anew."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.errors import ConfigError
from diptych.models.dual_encoder import DualEncoder
from diptych.models.prompts.splice import vocabulary
from diptych.testing import feature_with_vectors, tiny_tuned

PICTURES = torch.eye(16)[:2]
NAMES = ["red fox", "blue guinea pig", "light green fox"]
KEYS: dict[str, Any] = {
    "type": "compositional",
    "classes": NAMES,
    "attributes": ["red", "blue", "light green"],
    "objects": ["fox", "guinea pig"],
}


def build(**keys: Any) -> DualEncoder:
    return tiny_tuned(KEYS | keys)


def test_vectors_start_as_the_means_of_their_words() -> None:
    model = build()
    table, tokens = vocabulary(model.text_tower).weight, model.tokenizer(["guinea pig", "light green", "red"])
    expected = torch.stack([table[tokens[0, 1:3]].mean(0), table[tokens[1, 1:3]].mean(0), table[tokens[2, 1]]])
    torch.testing.assert_close(model.class_prompts.words.weight[[4, 2, 0]], expected)


def test_words_of_one_token_are_the_plain_prompt() -> None:
    model = build(dropout=0.0)
    found = model.read_classes(PICTURES, ["red fox", "blue fox"]).features
    expected = model.encode_text(model.tokenizer(["a photo of red fox.", "a photo of blue fox."]))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("template", "text"),
    [("a photo of {attribute} {object}.", "a photo of seven eight."), ("{object} in {attribute}", "eight in seven")],
)
def test_features_are_those_of_the_formula_for_pairs_seen_and_unseen(template: str, text: str) -> None:
    model = build(template=template, dropout=0.0)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.class_prompts.words.weight, std=0.1)
    words = model.class_prompts.words.weight
    pairs = {"red fox": (0, 3), "light green guinea pig": (2, 4), "blue fox": (1, 3)}
    expected = [feature_with_vectors(model, text, {"seven": words[a], "eight": words[o]}) for a, o in pairs.values()]
    found = model.read_classes(PICTURES, list(pairs)).features
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-5, rtol=0)  # float32 towers


def test_dropout_is_of_training_alone() -> None:
    model = build(dropout=0.5)
    first, again = model.read_classes(PICTURES).features, model.read_classes(PICTURES).features
    assert not torch.allclose(first, again)
    torch.testing.assert_close(
        model.eval().read_classes(PICTURES).features, build(dropout=0.0).read_classes(PICTURES).features
    )


def test_a_part_learns_from_each_pair_that_has_it() -> None:
    model = build(dropout=0.0)
    model.read_classes(PICTURES).features[0].sum().backward()
    touched = model.class_prompts.words.weight.grad.abs().amax(1) > 0
    assert touched.tolist() == [True, False, False, True, False]


def test_names_may_be_written_otherwise() -> None:
    model = build(classes=["fox: red", "guinea pig: blue"], pattern="{object}: {attribute}", dropout=0.0)
    found = model.read_classes(PICTURES, ["fox: red", "guinea pig: red"]).features
    torch.testing.assert_close(found, build(dropout=0.0).read_classes(PICTURES, ["red fox", "red guinea pig"]).features)


def test_parts_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "objects.txt").write_text("fox\nguinea pig\n")
    model = build(objects=str(tmp_path / "objects.txt"))
    assert model.class_prompts.pairs.objects == ("fox", "guinea pig")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"classes": ["red fox", "old fox"]}, "class 'old fox' is no pair of an attribute and an object"),
        (
            {"attributes": ["red", "light green", "light", "blue"], "objects": ["fox", "green fox", "guinea pig"]},
            "is 2 pairs",
        ),
        ({"attributes": ["red", "red"]}, "'red' stands there twice · model.adapters: attributes"),
        ({"attributes": []}, "attributes and objects must be named"),
        ({"attributes": ["&nbsp;", "red", "blue", "light green"]}, "no token in"),
        ({"pattern": "{object}"}, "pattern must hold {attribute} and {object} once each"),
        ({"template": "a {attribute}"}, "template must hold {attribute} and {object} once each"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"objects": "nowhere.txt"}, "not readable .*nowhere.txt.* objects"),
        ({"template": "x " * 20 + "{attribute} {object}"}, "does not fit into 16 tokens"),
    ],
)
def test_wrong_settings_are_one_line(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build(**keys)
    assert "\n" not in str(caught.value)


def test_an_unknown_pair_is_one_line() -> None:
    with pytest.raises(ConfigError, match="class 'red whale' is no pair"):
        build().read_classes(PICTURES, ["red whale"])
