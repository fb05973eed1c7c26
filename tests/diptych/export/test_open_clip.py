import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch

import diptych
from diptych.errors import CheckpointError
from diptych.export import to_open_clip
from diptych.models.dual_encoder import DualEncoder
from diptych.models.matching import MatchHead

Make = Callable[..., DualEncoder]
TEXTS = ["a red fox", "the cat on the grass!", "a photo of a cat on the red grass of a fox " * 9]
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [None, -10.0])
def test_open_clip_and_we_open_it_to_the_same(tmp_path: Path, make: Make, bias: float | None) -> None:
    model = make(bias=bias)
    difference = to_open_clip.export(model, tmp_path / "out")
    assert max(difference.image, difference.text) < 1e-5
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}", precision="fp32")
    for name in ("logit_scale", "logit_bias"):
        ours, their = getattr(model, name), getattr(theirs, name)
        assert (None if their is None else their.item()) == (None if ours is None else ours.item())
    for name in (f"open_clip:{tmp_path / 'out'}", str(tmp_path / "out")):
        again = diptych.load(name)
        with torch.no_grad():
            assert again.encode_image(IMAGES).equal(model.encode_image(IMAGES))
            torch.testing.assert_close(
                again.encode_text(TEXTS), model.encode_text(model.tokenizer(TEXTS)), atol=1e-6, rtol=0
            )
        assert (again.model.logit_bias is None) == (bias is None)


def test_who_opens_it_fetches_no_other_weights(tmp_path: Path, make: Make) -> None:
    model = make(vision={"timm_model_name": "test_vit", "image_size": 32})
    assert model.open_clip_config is not None
    model.open_clip_config["vision_cfg"]["timm_model_pretrained"] = True  # as after a run from public weights
    to_open_clip.export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert written["model_cfg"]["vision_cfg"]["timm_model_pretrained"] is False
    assert model.open_clip_config["vision_cfg"]["timm_model_pretrained"] is True
    diptych.load(str(tmp_path / "out"))


def test_captioners_write_the_same_there_and_back_here(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    vision, text = {"attentional_pool": True, "attn_pooler_queries": 5}, {"embed_cls": True}
    model = make(vision=vision, text=text, embed_dim=32, multimodal_cfg={"layers": 2, "heads": 2})
    model.match_head = MatchHead(32)
    to_open_clip.export(model, tmp_path / "out")
    assert "the matching head is left out" in caplog.text
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}", precision="fp32")
    assert type(theirs).__name__ == "CoCa"
    again = diptych.load(str(tmp_path / "out")).model
    tokens = model.tokenizer(TEXTS)
    with torch.no_grad():
        found = theirs(model.normalised(IMAGES), tokens)
        for each in (model, again):
            for ours, their in (
                (each.encode_image(IMAGES), found["image_features"]),
                (each.encode_text(tokens), found["text_features"]),
                (each.next_word_logits(IMAGES, tokens), found["logits"]),
            ):
                torch.testing.assert_close(ours, their, atol=1e-5, rtol=1e-5)


def test_an_export_that_foretells_other_words_is_not_written(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, text = {"attentional_pool": True, "attn_pooler_queries": 5}, {"embed_cls": True}
    model = make(vision=vision, text=text, embed_dim=32, multimodal_cfg={"layers": 2, "heads": 2})
    renamed = to_open_clip._renamed

    def wrong(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = renamed(state)
        return found | {"text_decoder.ln_final.bias": found["text_decoder.ln_final.bias"] + 0.5}

    monkeypatch.setattr(to_open_clip, "_renamed", wrong)
    with pytest.raises(CheckpointError, match="foretells other words"):
        to_open_clip.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
