"""The nearest words of learned vectors."""

from typing import Any

import pytest
import torch

from diptych.errors import ConfigError
from diptych.models.prompts.splice import vocabulary
from diptych.models.prompts.words import nearest
from diptych.testing import tiny_tuned

NAMES = ["red fox", "blue cat"]
KINDS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "context": ({"words": "a photo"}, [("context", "a"), ("context", "photo")]),
    "conditional_context": ({"words": "snow"}, [("context", "snow")]),
    "class_aware": ({"words": "snow"}, [("context", "snow")]),
    "compositional": (
        {"attributes": ["red", "blue"], "objects": ["fox", "cat"]},
        [("red", "red"), ("blue", "blue"), ("fox", "fox"), ("cat", "cat")],
    ),
    "mixture": (
        {"groups": [["a {} here"], ["the {}"]]},
        [("a {} here", "a"), ("a {} here", "here"), ("the {}", "the")],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_that_started_as_a_word_lies_at_it(kind: str) -> None:
    keys, expected = KINDS[kind]
    found = nearest(tiny_tuned({"type": kind, "classes": NAMES} | keys), 3)
    assert [(one.name, one.words[0][0]) for one in found] == expected
    assert all(len(one.words) == 3 for one in found)
    assert [one.words[0][1] for one in found] == pytest.approx([1.0] * len(found))


def test_neighbours_are_those_of_the_largest_cosine() -> None:
    model = tiny_tuned({"type": "context", "classes": NAMES, "length": 2, "per_class": True})
    table = torch.nn.functional.normalize(vocabulary(model.text_tower).weight.detach().double(), dim=1)
    vectors = model.class_prompts.context.weight.detach().double()
    found = nearest(model, 4)
    assert [(one.name, one.place) for one in found] == [
        ("red fox", 0),
        ("red fox", 1),
        ("blue cat", 0),
        ("blue cat", 1),
    ]
    for one, vector in zip(found, vectors, strict=True):
        cosines = table @ vector / vector.norm()
        rows = cosines.argsort(descending=True)[:4].tolist()
        assert [word for word, _ in one.words] == [model.tokenizer.word(row) for row in rows]
        assert [cosine for _, cosine in one.words] == pytest.approx(cosines[rows].tolist(), abs=1e-5)
        assert one.norm == pytest.approx(float(vector.norm()))


def test_no_vectors_are_one_line() -> None:
    with pytest.raises(ConfigError, match="no learned vector stands among words"):
        nearest(tiny_tuned({"type": "class_names", "classes": NAMES}, {"type": "lora"}))
    with pytest.raises(ConfigError, match="0 words of a vector"):
        nearest(tiny_tuned({"type": "context", "classes": NAMES, "length": 2}), 0)
