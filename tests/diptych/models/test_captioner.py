"""CoCa: one forward pass for both losses; no word is seen before it is foretold; weights are open_clip's."""

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.models import dual_encoder
from diptych.models.captions import next_words
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_CAPTIONER
from diptych.vocabulary import IGNORED, TokenLoss

TOWERS: dict[str, Any] = TINY_CAPTIONER["towers"]
TEXTS = ["a red fox", "the cat on the grass !=", "a fox"]
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
EXACT = {"atol": 1e-5, "rtol": 1e-5}  # other kernels for other lengths: rounding


def build(seed: int = 0, **keys: Any) -> DualEncoder:
    return dual_encoder.build(from_tree(ModelConfig, {"towers": TOWERS | keys}), seed=seed).eval()


def trimmed(model: DualEncoder, texts: list[str]) -> Tensor:
    tokens = model.tokenizer(texts)
    return tokens[:, : int((tokens != 0).any(0).nonzero().max()) + 1]


# --- losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_the_cross_entropies_of_the_next_words() -> None:
    model = build()
    tokens = trimmed(model, TEXTS)
    found = model(IMAGES, tokens, None, TokenLoss())
    targets = next_words(tokens)
    logits = model.next_word_logits(IMAGES, tokens)
    dense = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(found.caption_losses, dense.sum(1), **EXACT)
    assert found.caption_lengths.tolist() == [4, 8, 3]  # "!=" is two tokens, the first of them with id 0
    assert found.image_features.equal(model.encode_image(IMAGES))
    torch.testing.assert_close(found.text_features, model.encode_text(tokens), **EXACT)


def test_padding_changes_nothing() -> None:
    model = build()
    short, whole = trimmed(model, TEXTS), model.tokenizer(TEXTS)
    for longer in (F.pad(short, (0, 3)), whole):
        for ours, theirs in zip(
            model(IMAGES, short, None, TokenLoss()), model(IMAGES, longer, None, TokenLoss()), strict=True
        ):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, **EXACT)


def test_hard_captions_are_embedded_and_not_foretold() -> None:
    model = build()
    tokens = model.tokenizer(TEXTS)
    hard = model.tokenizer(["a blue fox", "a dog"] * 3).view(3, 2, -1)
    with_hard, without = model(IMAGES, tokens, hard, TokenLoss()), model(IMAGES, tokens, None, TokenLoss())
    torch.testing.assert_close(with_hard.caption_losses, without.caption_losses, **EXACT)
    torch.testing.assert_close(with_hard.text_features, without.text_features, **EXACT)
    torch.testing.assert_close(with_hard.hard_captions[1, 1], model.encode_text(hard[1, 1:])[0], **EXACT)


def test_all_parameters_learn_and_a_copy_sees_with_its_own() -> None:
    model = build().train()
    found = model(IMAGES, trimmed(model, TEXTS), None, TokenLoss(0.1, 1e-3))
    (found.image_features.sum() + found.text_features.sum() + found.logit_scale + found.caption_losses.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    tokens = trimmed(model, TEXTS)
    twin = copy.deepcopy(model).eval()
    before = twin.encode_text(tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin.encode_text(tokens).equal(before)


def test_weights_follow_from_the_seed() -> None:
    one, same, other = build(0).state_dict(), build(0).state_dict(), build(1).state_dict()
    assert all(value.equal(same[name]) for name, value in one.items())
    assert not one["text_decoder.text_projection"].equal(other["text_decoder.text_projection"])


# --- no peeking ------------------------------------------------------------------------------------------------------


ONE = build()


@given(st.integers(0, 13), st.lists(st.integers(0, 49405), min_size=15, max_size=15), st.integers(0, 2**31))
def test_no_word_is_seen_before_it_is_foretold(place: int, ids: list[int], seed: int) -> None:
    tokens = torch.tensor([[49406, *ids]])
    changed = tokens.clone()
    behind = changed[:, place + 1 :]
    behind.copy_(torch.randint(0, 49408, behind.shape, generator=torch.Generator().manual_seed(seed)))
    ours, theirs = (ONE.next_word_logits(IMAGES[:1], each)[:, : place + 1] for each in (tokens, changed))
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_the_picture_is_seen_by_the_decoder_and_not_by_the_text_tower() -> None:
    model = build()
    tokens = trimmed(model, TEXTS[:1])
    ours, theirs = (model(image[None], tokens, None, TokenLoss()) for image in IMAGES[:2])
    assert ours.text_features.equal(theirs.text_features)
    assert (ours.caption_losses - theirs.caption_losses).abs() > 1e-4


# --- open_clip -------------------------------------------------------------------------------------------------------


def test_open_clips_weights_give_open_clips_logits(tmp_path: Path) -> None:
    config = build().open_clip_config
    assert config is not None
    torch.manual_seed(3)
    theirs = open_clip.coca_model.CoCa(**config).eval()
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.1)  # open_clip leaves it to chance
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    model = build(weights=str(tmp_path / "weights.safetensors"))
    tokens = model.tokenizer(TEXTS)
    with torch.no_grad():
        found = theirs(model.normalised(IMAGES), tokens)
        torch.testing.assert_close(model.encode_image(IMAGES), found["image_features"], **EXACT)
        torch.testing.assert_close(model.encode_text(tokens), found["text_features"], **EXACT)
        torch.testing.assert_close(model.next_word_logits(IMAGES, tokens), found["logits"], **EXACT)
        short = trimmed(model, TEXTS)
        torch.testing.assert_close(model.encode_text(short), found["text_features"], **EXACT)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("length", [3, 14, 15, 16])
def test_texts_of_any_length_before_the_class_token(correct: bool, length: int) -> None:
    model = build()
    model.text_tower.correct_cls_mask = correct  # which no configuration of open_clip's sets yet
    tokens = torch.full((1, length), 320)
    whole = F.pad(tokens, (0, 16 - length))
    theirs, _ = open_clip.transformer.TextTransformer.forward(_own(model), whole)
    torch.testing.assert_close(model.encode_text(tokens), F.normalize(theirs, dim=-1), **EXACT)


def _own(model: DualEncoder) -> Any:
    """The text tower with open_clip's own code."""
    tower = copy.deepcopy(model.text_tower)
    del tower.__dict__["_embeds"]
    return tower


def test_without_a_decoder_a_captioners_towers_give_features(tmp_path: Path) -> None:
    pair = {"type": "pair", "image": TOWERS, "text": TOWERS}
    model = dual_encoder.build(from_tree(ModelConfig, {"towers": pair}), seed=0).eval()
    assert model.text_decoder is None
    assert model.encode_image(IMAGES).shape == model.encode_text(model.tokenizer(TEXTS)).shape == (3, 32)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"text": TOWERS["text"] | {"no_causal_mask": True}}, "foretell"),
        ({"embed_dim": 16}, "same width"),
        ({"multimodal": {"context_length": 8}}, "context_length"),
        ({"multimodal": {"leyers": 8}}, "leyers"),
        ({"vision": {"timm_model_name": "test_vit", "image_size": 160}}, "vision transformer"),
    ],
)
def test_what_makes_no_captioner_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**keys)
