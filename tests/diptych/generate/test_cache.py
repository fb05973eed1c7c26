"""Going on word by word gives what one pass over the whole caption gives."""

from typing import Any

import pytest
import torch

from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.generate.cache import CaptionWriter
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_CAPTIONER, TINY_MODEL

TOWERS: dict[str, Any] = TINY_CAPTIONER["towers"]
IMAGES = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a photo of the red fox and the cat on the grass", "one two three four five six seven eight nine ten eleven"]
EXACT = {"atol": 1e-5, "rtol": 1e-5}  # other kernels for other lengths: rounding


def build(**keys: Any) -> DualEncoder:
    torch.manual_seed(0)
    model = dual_encoder.build(from_tree(ModelConfig, {"towers": TOWERS | keys}), seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so large that each word is felt
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"text": TOWERS["text"] | {"embed_cls": False, "layers": 2}},
        {"multimodal": {"layers": 3, "heads": 4, "ls_init_value": 0.5}},
    ],
    ids=["coca", "clip", "deep"],
)
@torch.no_grad()
def test_the_cache_changes_nothing(keys: dict[str, Any]) -> None:
    model = build(**keys)
    tokens = model.tokenizer(TEXTS)[:, :11]
    slow = model.next_word_logits(IMAGES, tokens)
    _, image_tokens = model.see(IMAGES)
    assert image_tokens is not None
    writer = CaptionWriter(model, image_tokens)
    fast = torch.stack([writer.step(tokens[:, place]).logits for place in range(tokens.shape[1] - 1)], 1)
    torch.testing.assert_close(fast, slow, **EXACT)
    assert (slow[:, 1:] - slow[:, :-1]).abs().max() > 0.1


@torch.no_grad()
def test_chosen_captions_go_on_as_if_alone() -> None:
    model = build()
    tokens = model.tokenizer([TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[0]])[:, :8]  # two of each picture
    _, image_tokens = model.see(IMAGES)
    assert image_tokens is not None
    writer = CaptionWriter(model, image_tokens)
    writer.step(tokens[[0, 2], 0])
    writer.select(torch.tensor([0, 0, 1, 1]))
    for place in range(1, 6):
        found = writer.step(tokens[:, place]).logits
    both = model.next_word_logits(IMAGES.repeat_interleave(2, 0), tokens)
    torch.testing.assert_close(found, both[:, 5], **EXACT)
    writer.select(torch.tensor([1, 1, 3, 2]))
    swapped = tokens[[1, 1, 3, 2]]
    found = writer.step(swapped[:, 6]).logits
    torch.testing.assert_close(found, model.next_word_logits(IMAGES.repeat_interleave(2, 0), swapped)[:, 6], **EXACT)


@torch.no_grad()
def test_an_early_layer_is_one_of_a_shallower_decoder() -> None:
    model = build()
    _, image_tokens = model.see(IMAGES)
    assert image_tokens is not None
    first = model.tokenizer(TEXTS)[:, 0]
    early = CaptionWriter(model, image_tokens, early_layer=1).step(first).early_logits
    decoder: Any = model.text_decoder
    decoder.resblocks, decoder.cross_attn = decoder.resblocks[:1], decoder.cross_attn[:1]
    torch.testing.assert_close(early, CaptionWriter(model, image_tokens).step(first).logits, **EXACT)


def test_what_cannot_go_on_is_refused() -> None:
    plain = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0)
    with pytest.raises(ConfigError, match="writes no captions"):
        CaptionWriter(plain, torch.zeros(1, 5, 32))
    with pytest.raises(ConfigError, match="below the last"):
        CaptionWriter(build(), torch.zeros(1, 5, 32), early_layer=2)
    custom = build(text=TOWERS["text"] | {"qk_norm": True})
    with pytest.raises(ConfigError, match="block_type"):
        CaptionWriter(custom, torch.zeros(1, 5, 32))
