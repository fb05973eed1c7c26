"""An image tower of one source, a text tower of another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.config import from_tree, to_tree
from diptych.errors import ConfigError
from diptych.export.to_open_clip import export
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_MODEL

WIDE = TINY_MODEL["towers"] | {"embed_dim": 24}


def pair(*, frozen: tuple[str, ...] = (), **keys: Any) -> DualEncoder:
    towers = {"type": "pair", "image": TINY_MODEL["towers"], "text": WIDE} | keys
    return dual_encoder.build(from_tree(ModelConfig, {"towers": towers, "frozen": list(frozen)}), seed=0)


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
    with pytest.raises(ConfigError, match="16 and 24 numbers"):
        pair()
    with pytest.raises(ConfigError, match="must be positive"):
        pair(embed_dim=0)


def test_a_tower_alone_can_be_locked() -> None:
    model = pair(embed_dim=24, frozen=("image_tower.tower",)).train()
    assert not model.image_tower.tower.training
    assert model.image_tower.training
    assert model.text_tower.tower.training
    found = model(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), model.tokenizer(["a", "b c"]))
    (found.image_features * found.text_features).sum().backward()
    learned = {name for name, parameter in model.image_tower.named_parameters() if parameter.grad is not None}
    assert learned == {"projection.weight"}
    assert model.eval().training is False


def test_features_are_those_of_the_sources() -> None:
    model = pair(embed_dim=24).eval()
    wide = dual_encoder.build(from_tree(ModelConfig, {"towers": WIDE}), seed=0).eval()
    wide.text_tower.load_state_dict(model.text_tower.tower.state_dict())
    tokens = model.tokenizer(["a fox", "b"])
    with torch.no_grad():
        assert model.encode_text(tokens).equal(wide.encode_text(tokens))


def test_pairs_in_pairs_and_back_to_yaml() -> None:
    inner = {"type": "pair", "image": TINY_MODEL["towers"], "text": WIDE, "embed_dim": 12}
    config = from_tree(ModelConfig, {"towers": {"type": "pair", "image": inner, "text": WIDE, "embed_dim": 8}})
    assert from_tree(ModelConfig, to_tree(config)) == config
    assert dual_encoder.build(config, seed=0).embed_dim == 8


def test_no_export_to_open_clip(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="open_clip cannot build these towers"):
        export(pair(embed_dim=24), tmp_path / "out")
