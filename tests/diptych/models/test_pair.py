"""An image tower of one source, a text tower of another."""

from typing import Any

import pytest
import torch

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_MODEL

WIDE = TINY_MODEL["towers"] | {"embed_dim": 24}


def pair(**keys: Any) -> DualEncoder:
    towers = {"type": "pair", "image": TINY_MODEL["towers"], "text": WIDE} | keys
    return dual_encoder.build(from_tree(ModelConfig, {"towers": towers}), seed=0)


def test_both_meet_in_one_space_and_every_parameter_learns() -> None:
    model = pair(embed_dim=20)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    found = model(images, model.tokenizer(["a", "b c", "d"]))
    assert found.image_features.shape == found.text_features.shape == (3, 20)
    logits = found.image_features @ found.text_features.T * found.logit_scale
    torch.nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_widths_that_agree_need_no_projection() -> None:
    plain = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0)
    both = pair(text=TINY_MODEL["towers"])
    assert sum(p.numel() for p in both.parameters()) == sum(p.numel() for p in plain.parameters())


def test_widths_that_differ_want_a_common_one() -> None:
    with pytest.raises(ConfigError, match="embed_dim"):
        pair()
