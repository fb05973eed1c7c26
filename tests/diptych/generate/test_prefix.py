"""Captions by a language model: those of transformers' own way to write, and of one pass over the whole caption."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tests.diptych.models.language_models import ROTARY, SIZE, VOCABULARY, build, folder, gpt2, llama, tree, trimmed
from torch import Tensor

import diptych.testing as make
from diptych.cli import main
from diptych.config import from_tree
from diptych.errors import ConfigError
from diptych.generate import GenerateConfig, captions, write
from diptych.generate.prefix import PrefixWriter
from diptych.models.dual_encoder import DualEncoder
from diptych.train import loop

IMAGES = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a red fox in the snow", "the cat of the red fox !"]
EXACT = {"atol": 1e-5, "rtol": 1e-5}  # other kernels for other lengths: rounding
FRAMES = [{}, {"template": "the {} in snow"}]
STARTS = [False, True]


def mamba() -> Any:
    """No attention: a state in place of keys and values."""
    config = transformers.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, **SIZE)
    return transformers.MambaForCausalLM(config)


def mistral() -> Any:
    """Fewer keys than queries, and only the newest few."""
    config = transformers.MistralConfig(**ROTARY, **SIZE, num_key_value_heads=1, sliding_window=6)
    return transformers.MistralForCausalLM(config)


KINDS = pytest.mark.parametrize("kind", [gpt2, llama])


def teller(path: Path, **keys: Any) -> DualEncoder:
    """Of pictures that it is not blind to."""
    model = build(path, **keys)
    with torch.no_grad():
        model.text_decoder.prefix.weight.normal_(std=2.0)  # type: ignore[union-attr, operator]
    return model


def writer(model: DualEncoder, images: Tensor = IMAGES[:2], **keys: Any) -> PrefixWriter:
    _, image_tokens = model.see(images)
    assert image_tokens is not None
    return PrefixWriter(model, image_tokens, **keys)


def config(**keys: Any) -> GenerateConfig:
    return from_tree(GenerateConfig, {"max_length": 8} | keys)


# --- the slow twin ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [gpt2, llama, mistral, mamba])
@pytest.mark.parametrize("towers", FRAMES, ids=["plain", "template"])
@pytest.mark.parametrize("starts", STARTS, ids=["bare", "start"])
@torch.no_grad()
def test_word_by_word_is_one_pass_over_given_captions(
    kind: Any, towers: dict[str, Any], starts: bool, tmp_path: Path
) -> None:
    model = build(folder(tmp_path / "lm", kind(), starts=starts), towers=towers)
    spelling, tokens = model.spelling, trimmed(model, TEXTS)
    assert spelling is not None
    slow, first = model.next_word_logits(IMAGES[:2], tokens), len(spelling.start)
    assert first == len(towers) + starts
    steps = writer(model)
    fast = [steps.start().logits, *(steps.step(tokens[:, place] - 1).logits for place in range(first, 6))]
    torch.testing.assert_close(torch.stack(fast, 1), slow[:, first:7], **EXACT)
    assert (slow[:, 1:] - slow[:, :-1]).abs().max() > 0.1


@KINDS
@torch.no_grad()
def test_chosen_captions_go_on_as_if_alone(kind: Any, tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", kind()))
    tokens = trimmed(model, [TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[0]])  # two of each picture
    both = model.next_word_logits(IMAGES[:2].repeat_interleave(2, 0), tokens)
    steps = writer(model)
    torch.testing.assert_close(steps.start().logits, both[[0, 2], 0], **EXACT)
    steps.select(torch.tensor([0, 0, 1, 1]))
    for place in range(3):
        torch.testing.assert_close(steps.step(tokens[:, place] - 1).logits, both[:, place + 1], **EXACT)
    rows = torch.tensor([1, 1, 3, 2])
    steps.select(rows)
    swapped = model.next_word_logits(IMAGES[:2].repeat_interleave(2, 0), tokens[rows])
    torch.testing.assert_close(steps.step(tokens[rows, 3] - 1).logits, swapped[:, 4], **EXACT)


@KINDS
@torch.no_grad()
def test_an_early_layer_is_the_last_of_a_shallower_model(kind: Any, tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", kind()))
    decoder: Any = model.text_decoder
    steps = writer(model, early_layer=1)
    ids = torch.tensor([3, 4])
    early = [steps.start().early_logits, steps.step(ids).early_logits]
    layers = decoder.model.h if kind is gpt2 else decoder.model.layers
    assert not layers[0]._forward_hooks
    del layers[1]
    decoder.model.config.num_hidden_layers = 1
    steps = writer(model)
    torch.testing.assert_close(early, [steps.start().logits, steps.step(ids).logits], **EXACT)


# --- transformers' own way -------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("starts", STARTS, ids=["bare", "start"])
@pytest.mark.parametrize("method", [{"method": "greedy"}, {"method": "beam", "beams": 1}, {"method": "beam"}], ids=str)
def test_it_writes_what_transformers_does(kind: Any, starts: bool, method: dict[str, Any], tmp_path: Path) -> None:
    path = folder(tmp_path / "lm", kind(), starts=starts)
    model, theirs = teller(path), type(kind()).from_pretrained(path).eval()
    assert model.spelling is not None
    assert model.text_decoder is not None
    with torch.no_grad():
        prefix = model.text_decoder.prefix(model.encode_image(IMAGES)).unflatten(1, (3, 16))
        start = theirs.get_input_embeddings()(torch.tensor(model.spelling.start, dtype=torch.long)).expand(5, -1, -1)
    keys = {"num_beams": 5, "early_stopping": True} if method == {"method": "beam"} else {}
    expected = theirs.generate(
        inputs_embeds=torch.cat([prefix, start], 1),
        attention_mask=torch.ones(5, 3 + starts),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=1,
        suppress_tokens=list(model.spelling.banned),
        **keys,
    )
    found = write(model, IMAGES, config(**method))
    assert found.tolist() == expected.tolist()
    assert len({tuple(row) for row in found.tolist()}) > 1


METHODS: list[dict[str, Any]] = [
    {"method": "greedy"},
    {"method": "beam", "beams": 3},
    {"method": "sample", "top_k": 9, "top_p": 0.9},
    {"method": "contrastive"},
]


@KINDS
@pytest.mark.parametrize("keys", METHODS, ids=lambda keys: keys["method"])
@pytest.mark.parametrize("layer", [None, 1])
def test_batches_change_nothing(kind: Any, keys: dict[str, Any], layer: int | None, tmp_path: Path) -> None:
    model, settings = teller(folder(tmp_path / "lm", kind())), config(**keys, layer_contrast=layer)
    together = captions(model, IMAGES, settings)
    assert together == captions(model, IMAGES, settings)
    assert together == [captions(model, IMAGES[i : i + 1], settings, first=i)[0] for i in range(5)]
    assert len(set(together)) > 1
    assert set(" ".join(together).split()) <= set(VOCABULARY[2:])


@KINDS
def test_one_beam_and_no_penalty_are_greedy(kind: Any, tmp_path: Path) -> None:
    model = teller(folder(tmp_path / "lm", kind()))
    greedy = write(model, IMAGES, config(method="greedy"))
    assert write(model, IMAGES, config(method="beam", beams=1)).equal(greedy)
    assert write(model, IMAGES, config(method="contrastive", penalty=0)).equal(greedy)
    assert write(model, IMAGES, config(method="sample", top_k=1)).equal(greedy)


@pytest.mark.parametrize("keys", METHODS, ids=lambda keys: keys["method"])
def test_captions_fit_between_start_and_template(keys: dict[str, Any], tmp_path: Path) -> None:
    model = teller(folder(tmp_path / "lm", llama(), starts=True), towers={"template": "the {} in snow"})
    assert model.spelling is not None
    assert model.spelling.end == VOCABULARY.index("in")  # behind every caption, so none has it
    ids = write(model, IMAGES, config(**keys, min_length=28, max_length=30))
    assert ids.shape == (5, 12)  # of 16 places start, `the`, `snow` and end are taken, and `in` is one of these
    assert not set(ids.flatten().tolist()) & {0, 1, VOCABULARY.index("in"), *range(13, 40)}
    texts = captions(model, IMAGES, config(**keys, min_length=11, max_length=12))
    targets = model.targets(model.tokenizer(texts))
    assert (targets >= 0).sum(1).eq(12).all()  # as in training


# --- doors -----------------------------------------------------------------------------------------------------------


def test_a_trained_run_writes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tree(folder(tmp_path / "lm", llama()))
    objective = {"regularisers": [{"type": "caption"}]}
    loop.train(make.tiny_recipe(shards, tmp_path / "run", model=keys, objective=objective, total_samples=64))
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    arguments = ["caption", str(tmp_path / "run"), str(tmp_path / "red.png"), "--method", "greedy"]
    assert main(arguments) == 0
    path, text = capsys.readouterr().out.rstrip("\n").split("\t")
    assert path == str(tmp_path / "red.png")
    assert set(text.split()) <= set(VOCABULARY[2:])
    assert main([*arguments, "--layer-contrast", "2"]) == 2
    assert "layer_contrast is 2, the decoder has 2 layers" in capsys.readouterr().err


def test_what_cannot_go_on_is_one_line(tmp_path: Path) -> None:
    model = build(folder(tmp_path / "lm", llama()))
    layers: Any = model.text_decoder.model  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="layer_contrast is 2, the decoder has 2 layers"):
        writer(model, early_layer=2)
    del layers.norm
    with pytest.raises(ConfigError, match="the layers of 'llama' and the norm behind them are not known"):
        writer(model, early_layer=1)
    layers.forward = lambda inputs_embeds, use_cache: None
    with pytest.raises(ConfigError, match="'llama' cannot go on word by word") as caught:
        writer(model)
    assert "\n" not in str(caught.value)
