from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import diptych
from diptych.errors import CheckpointError, ConfigError, DataError
from diptych.export import to_transformers
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.towers.hf import HfTowers

Make = Callable[..., DualEncoder]
TEXTS = ["a red fox", "", "the cat on the grass!", "a photo of a cat on the red grass of a fox " * 9]
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ROUNDING = {"atol": 1e-5, "rtol": 0.0}


def their_features(folder: Path, model: DualEncoder) -> tuple[Tensor, Tensor]:
    """What transformers gives, with nothing of ours but the pixels' mean and deviation."""
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.pixels.mean, model.pixels.std))
    inputs = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        image = theirs.get_image_features((IMAGES / 255 - mean) / std)
        text = theirs.get_text_features(**inputs)
    found = [getattr(output, "pooler_output", output) for output in (image, text)]
    return torch.nn.functional.normalize(found[0]), torch.nn.functional.normalize(found[1])


def our_features(model: DualEncoder) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(IMAGES), model.encode_text(model.tokenizer(TEXTS))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "tanh": {"vision": {"act_kwargs": {"approximate": "tanh"}}, "text": {"act_kwargs": {"approximate": "tanh"}}},
    "eps": {"vision": {"norm_kwargs": {"eps": 0.01}}, "text": {"norm_kwargs": {"eps": 0.1}}},
    "sizes": {"vision": {"layers": 2, "mlp_ratio": 3, "head_width": 8}, "text": {"layers": 3, "heads": 4}},
    "no_projection": {"text": {"proj_type": "none", "width": 16}},
    "eos": {"text": {"pool_type": "eos", "eos_id": 49407}},
    "norm_after_pooling": {"vision": {"final_ln_after_pool": True}},
    "patch_dropout": {"vision": {"patch_dropout": 0.5}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_clip_model_gives_the_same_features(tmp_path: Path, make: Make, variant: str) -> None:
    model = make(**VARIANTS[variant])
    difference = to_transformers.export(model, tmp_path / "out")
    assert max(difference.image, difference.text) < 1e-5
    for ours, theirs in zip(our_features(model), their_features(tmp_path / "out", model), strict=True):
        torch.testing.assert_close(theirs, ours, **ROUNDING)
        assert (ours[0] - ours[1]).abs().max() > 0.01  # or nothing would have been compared


def test_logits_are_the_same_by_the_doors_that_users_take(tmp_path: Path, make: Make) -> None:
    model = make()
    to_transformers.export(model, tmp_path / "out")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    for door in (transformers.AutoProcessor, transformers.CLIPProcessor):
        processor = door.from_pretrained(tmp_path / "out")
        inputs = processor(images=list(IMAGES), text=TEXTS, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            logits = theirs(**inputs).logits_per_image
            image, text = our_features(model)
        torch.testing.assert_close(logits, image @ text.T * model.logit_scale.exp(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("keys", "property"),
    [
        ({"vision": {"layers": [1, 1, 1, 1], "image_size": 32}}, "ModifiedResNet"),
        ({"vision": {"timm_model_name": "test_vit"}}, "no ViT of open_clip (VisionTransformer)"),
        ({"vision": {"no_ln_pre": True}}, "no_ln_pre"),
        ({"vision": {"attentional_pool": True}}, "attentional_pool"),
        ({"vision": {"pool_type": "avg"}}, "pool_type: avg"),
        ({"vision": {"ls_init_value": 0.1}}, "layer scale in the image tower"),
        ({"text": {"ls_init_value": 0.1}}, "layer scale in the text tower"),
        ({"text": {"qk_norm": True}}, "layers of the text tower"),
        ({"text": {"embed_cls": True}}, "embed_cls"),
        ({"text": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"text": {"pool_type": "last"}}, "pool_type: last"),
        ({"text": {"proj_bias": True}}, "proj_bias"),
        ({"text": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "tokenizer_kwargs"),
    ],
)
def test_what_a_clip_model_cannot_be_is_named(tmp_path: Path, make: Make, keys: dict[str, Any], property: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_transformers.export(make(**keys), tmp_path / "out")
    assert property in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_is_left_out_is_said(tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    to_transformers.export(make(bias=-10.0), tmp_path / "out")
    assert "bias=-10" in caplog.text
    assert "logit bias" in (tmp_path / "out" / "README.md").read_text()


def test_there_and_back(tmp_path: Path, make: Make) -> None:
    model = make()
    to_transformers.export(model, tmp_path / "one")
    again = diptych.load(f"hf:{tmp_path / 'one'}")
    to_transformers.export(again.model, tmp_path / "two")
    third = diptych.load(str(tmp_path / "two"))
    for encoder in (again, third):
        torch.testing.assert_close(encoder.encode_image(IMAGES), our_features(model)[0], **ROUNDING)
        torch.testing.assert_close(encoder.encode_text(TEXTS), our_features(model)[1], **ROUNDING)
        assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())
        assert (encoder.model.pixels.mean, encoder.model.pixels.std) == (
            pytest.approx(model.pixels.mean),
            pytest.approx(model.pixels.std),
        )


def test_a_trained_siglip_goes_back_with_its_bias(tmp_path: Path, siglip: Path) -> None:
    model = dual_encoder.build(ModelConfig(towers=HfTowers(str(siglip))), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = model(IMAGES, model.tokenizer(TEXTS))
    logits = found.image_features @ found.text_features.T * found.logit_scale + found.logit_bias
    torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.eye(4)).backward()
    optimizer.step()
    difference = to_transformers.export(model, tmp_path / "out")
    assert max(difference.image, difference.text) < 1e-5
    assert "model_type: siglip" in (tmp_path / "out" / "README.md").read_text()
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out")
    before = transformers.AutoModel.from_pretrained(siglip)
    assert model.logit_bias is not None
    assert theirs.logit_bias.item() == model.logit_bias.item() != before.logit_bias.item()
    assert theirs.logit_scale.item() == model.logit_scale.item() != before.logit_scale.item()
    changed = [name for name, value in theirs.state_dict().items() if not value.equal(before.state_dict()[name])]
    assert any(name.startswith("vision_model") for name in changed)
    assert any(name.startswith("text_model") for name in changed)
    model.eval()
    for ours, their in zip(our_features(model), their_features(tmp_path / "out", model), strict=True):
        torch.testing.assert_close(their, ours, **ROUNDING)
    again = diptych.load(str(tmp_path / "out"))
    torch.testing.assert_close(again.encode_text(TEXTS), our_features(model)[1], **ROUNDING)
    assert again.model.logit_bias is not None
    assert again.model.logit_bias.item() == model.logit_bias.item()
    assert type(transformers.AutoProcessor.from_pretrained(tmp_path / "out")).__name__ == "SiglipProcessor"


def test_shorter_captions_stay_shorter(tmp_path: Path, siglip: Path) -> None:
    model = dual_encoder.build(ModelConfig(towers=HfTowers(str(siglip), context_length=5)), seed=0)
    assert to_transformers.export(model, tmp_path / "out").text < 1e-5
    assert diptych.load(str(tmp_path / "out")).model.tokenizer.context_length == 5


def test_an_export_that_differs_is_not_written(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.export import clip_weights

    def damaged(model: DualEncoder) -> dict[str, Tensor]:
        found = dict(state(model))
        query, key = (
            "text_model.encoder.layers.0.self_attn.q_proj.weight",
            "text_model.encoder.layers.0.self_attn.v_proj.weight",
        )
        found[query], found[key] = found[key], found[query]
        return found

    state = clip_weights.state
    monkeypatch.setattr(clip_weights, "state", damaged)
    with pytest.raises(CheckpointError, match=r"other features.*nothing is written"):
        to_transformers.export(make(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_exports_are_replaced(tmp_path: Path, make: Make) -> None:
    model, out = make(), tmp_path / "out"
    to_transformers.export(model, out)
    with pytest.raises(DataError, match="not empty"):
        to_transformers.export(model, out)
    (out / "stale.json").write_text("{}")
    to_transformers.export(model, out, overwrite=True)
    assert not (out / "stale.json").exists()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "fox.jpg").write_bytes(b"fox")
    with pytest.raises(DataError, match="not an export"):
        to_transformers.export(model, tmp_path / "pictures", overwrite=True)
    with pytest.raises(DataError, match="is a file"):
        to_transformers.export(model, tmp_path / "pictures" / "fox.jpg", overwrite=True)
    assert (tmp_path / "pictures" / "fox.jpg").read_bytes() == b"fox"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]
