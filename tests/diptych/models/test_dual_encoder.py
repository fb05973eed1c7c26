import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from diptych.config import from_tree
from diptych.errors import CheckpointError, ConfigError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.ema import Ema
from diptych.testing import TINY_MODEL, tiny_model


@pytest.fixture
def model() -> DualEncoder:
    return dual_encoder.build(tiny_model(), seed=0).eval()


IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_are_unit_norm_and_seeds_decide_the_weights(model: DualEncoder) -> None:
    before = torch.random.get_rng_state()
    with torch.no_grad():
        image, text, scale, bias, hard, *rest = model(IMAGES, model.tokenizer(["a", "b", "c"]))
        again = dual_encoder.build(tiny_model(), seed=0).eval()(IMAGES, model.tokenizer(["a", "b", "c"]))
        other = dual_encoder.build(tiny_model(), seed=1).eval().encode_image(IMAGES)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert bias is None
    assert hard is None
    assert set(rest) == {None}
    assert image.equal(again.image_features)
    assert not image.equal(other)
    assert before.equal(torch.random.get_rng_state())


def test_pixels_are_normalised_as_open_clip_does(model: DualEncoder) -> None:
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = F.normalize(model.image_tower((IMAGES / 255 - mean) / std), dim=-1)
        torch.testing.assert_close(model.encode_image(IMAGES), expected, atol=1e-5, rtol=1e-5)


def test_trimmed_captions_have_the_same_features(model: DualEncoder) -> None:
    tokens = model.tokenizer(["waving hand", "a much longer caption about a cat"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens[:, :11]), model.encode_text(tokens), atol=1e-6, rtol=1e-5)


def test_the_same_features_as_open_clips_own_model(model: DualEncoder) -> None:
    theirs = open_clip.model.CustomTextCLIP(**model.open_clip_config).eval()
    theirs.visual.load_state_dict(model.image_tower.state_dict())
    theirs.text.load_state_dict(model.text_tower.state_dict())
    tokens = model.tokenizer(["one", "two words"])
    with torch.no_grad():
        expected = theirs.encode_text(tokens, normalize=True)
        torch.testing.assert_close(model.encode_text(tokens), expected, atol=1e-6, rtol=1e-5)


def test_a_logit_bias_is_learned_when_asked() -> None:
    model = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"logit_bias": -10.0}), seed=0)
    assert model(IMAGES, model.tokenizer(["a", "b", "c"])).logit_bias.item() == -10.0
    assert "logit_bias" in dict(model.named_parameters())


def test_the_scale_is_clamped_at_100(model: DualEncoder) -> None:
    model.logit_scale.data.fill_(9.0)
    model.clamp_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize(
    ("towers", "error", "message"),
    [
        ({"name": "ViT-B-33"}, ConfigError, "did you mean 'ViT-B-32'"),
        ({"name": "nowhere.json"}, ConfigError, "not readable"),
        ({"vision": {"width": 32}}, ConfigError, "embed_dim is missing"),
        ({"embed_dim": 8, "vision": {"colour": 1}}, ConfigError, "colour"),
        ({"name": "RN50", "weights": "no_such_tag"}, CheckpointError, "neither a tag"),
    ],
)
def test_what_cannot_be_built_is_named(towers: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dual_encoder.build(from_tree(ModelConfig, {"towers": {"type": "open_clip"} | towers}), seed=0)


def test_a_file_in_open_clips_form_and_local_weights(tmp_path: Path, model: DualEncoder) -> None:
    from diptych.export.to_open_clip import export

    export(model, tmp_path)
    towers = {
        "type": "open_clip",
        "name": str(tmp_path / "open_clip_config.json"),
        "weights": str(tmp_path / "open_clip_model.safetensors"),
    }
    again = dual_encoder.build(from_tree(ModelConfig, {"towers": towers}), seed=5).eval()
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 16
    with torch.no_grad():
        assert again.encode_image(IMAGES).equal(model.encode_image(IMAGES))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="do not fit"):
        dual_encoder.build(from_tree(ModelConfig, {"towers": towers}), seed=5)


def test_the_average_follows_its_formula(model: DualEncoder) -> None:
    ema = Ema(model, decay=0.5)
    start = model.logit_scale.item()
    expected = start
    for update, value in enumerate((1.0, 2.0, 3.0), start=1):
        model.logit_scale.data.fill_(value)
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    assert ema.model.logit_scale.item() == pytest.approx(expected, rel=1e-6)
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def frozen(*prefixes: str) -> dual_encoder.DualEncoder:
    return dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"frozen": list(prefixes)}), seed=0)


def test_a_locked_tower_learns_nothing_and_stays_in_evaluation() -> None:
    model = frozen("image_tower", "text_tower.token_embedding").train()
    assert not model.image_tower.training
    assert model.text_tower.training
    features = model(IMAGES, model.tokenizer(["a", "b", "c"]))
    assert not features.image_features.requires_grad
    (features.image_features @ features.text_features.T * features.logit_scale).sum().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {
        name
        for name, _ in model.named_parameters()
        if not name.startswith("image_tower.") and name != "text_tower.token_embedding.weight"
    }
    plain = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0)(IMAGES, model.tokenizer(["a", "b", "c"]))
    # Without gradients torch's attention takes another way, equal to rounding.
    torch.testing.assert_close(features.image_features, plain.image_features, atol=1e-6, rtol=1e-5)


def test_names_that_freeze_nothing_or_everything() -> None:
    with pytest.raises(ConfigError, match=r"begins with 'image_towr' · model.frozen · did you mean 'image_tower'"):
        frozen("image_towr")
    with pytest.raises(ConfigError, match="no parameter is left"):
        frozen("image_tower", "text_tower", "logit_scale")
