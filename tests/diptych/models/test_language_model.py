"""A causal language model as text tower: exact whatever the padding, tuned like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import diptych.testing as make
from diptych.config import from_tree
from diptych.encoder import load
from diptych.errors import CheckpointError, ConfigError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_MODEL
from diptych.train import loop

WORDS = ["a", "x", "of", "the", "red", "fox", "caption", "cat", "in", "snow", "!"]
TEXTS = ["a red fox", "cat", "", "the cat of the red fox in the snow of the cat !"]
SIZE = {"vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}


def llama() -> Any:
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(**layers, **SIZE))


def gpt2() -> Any:
    return transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **SIZE))


def qwen() -> Any:
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.Qwen2Model(transformers.Qwen2Config(**layers, num_key_value_heads=1, **SIZE))


def bert() -> Any:
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(**layers, vocab_size=13))


def folder(path: Path, model: Any, *, end: str | None = "<e>") -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that each token is felt
    model.save_pretrained(path)
    ids = {word: number for number, word in enumerate(["<s>", "<e>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="!", eos_token=end)
    fast.save_pretrained(path)
    return path


def config(path: Path, **keys: Any) -> dict[str, Any]:
    towers = {"type": "language_model", "image": TINY_MODEL["towers"], "name": str(path), "context_length": 16}
    return {"towers": towers | keys.pop("towers", {})} | keys


def build(path: Path, **keys: Any) -> DualEncoder:
    return dual_encoder.build(from_tree(ModelConfig, config(path, **keys)), seed=0).eval()


@pytest.mark.parametrize("kind", [llama, gpt2, qwen])
def test_features_are_those_of_single_captions(kind: Any, tmp_path: Path) -> None:
    path = folder(tmp_path / "lm", kind())
    model, theirs = build(path), type(kind()).from_pretrained(path).eval()
    # Not by WORDS: of Qwen's tokenizers transformers takes the words, and makes the rest itself.
    tokens, tokenizer = model.tokenizer(TEXTS), transformers.AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        together = model.text_tower(tokens)
        for row, text in enumerate(TEXTS):
            ids = [*tokenizer(text).input_ids[:15], 1]
            state = theirs(torch.tensor([ids])).last_hidden_state[0, -1]
            torch.testing.assert_close(together[row], model.text_tower.projection(state), atol=1e-5, rtol=1e-5)
            alone = model.text_tower(tokens[row : row + 1, : len(ids)])
            torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


def test_the_template_stands_around_the_caption(tmp_path: Path) -> None:
    path = folder(tmp_path / "lm", llama())
    inside, outside = build(path, towers={"template": "a {} in snow"}), build(path)
    assert inside.tokenizer(["red fox"]).equal(outside.tokenizer(["a red fox in snow"]))


def test_learned_words_stand_among_its_own(tmp_path: Path) -> None:
    adapter = {"type": "context", "classes": ["fox !", "cat !"], "words": "a red", "position": "front"}
    model = build(folder(tmp_path / "lm", gpt2()), adapters=[adapter])
    plain = model.encode_text(model.tokenizer(["a red fox !.", "a red cat !."]))
    found = model.read_classes(torch.zeros(1, 16), ["fox !", "cat !"]).features
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)


def test_lora_tunes_it_and_the_run_opens(tmp_path: Path, shards: Path) -> None:
    path = folder(tmp_path / "lm", llama())
    adapters = [{"type": "lora", "tower": "text", "rank": 2}]
    tree = config(path, adapters=adapters, unfrozen=["text_tower.projection"])
    before = dual_encoder.build(from_tree(ModelConfig, tree), seed=0)
    names = [name for name, parameter in before.named_parameters() if parameter.requires_grad]
    assert "text_tower.projection.weight" in names
    assert any("gate_proj.lora_A" in name for name in names)
    run = loop.train(make.tiny_recipe(shards, tmp_path / "run", model=tree, total_samples=16))
    found = load(str(run.root)).encode_text(["a red fox"])
    assert not torch.allclose(found, before.eval().encode_text(before.tokenizer(["a red fox"])), atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"template": "caption"}, "template 'caption' has no {} for the caption"),
        ({"context_length": 64}, "captions cannot have 64 tokens, at most 32"),
        ({"context_length": 1}, "context_length must be at least 2"),
        ({"name": "/nowhere/at/all"}, "transformers cannot open '/nowhere/at/all'"),
    ],
)
def test_wrong_settings_are_one_line(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build(folder(tmp_path / "lm", llama()), towers=keys)
    assert "\n" not in str(caught.value)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'bert' sees what follows, it is no causal language model"):
        build(folder(tmp_path / "bert", bert()))
    with pytest.raises(ConfigError, match="the tokenizer has no end-of-text token"):
        build(folder(tmp_path / "endless", llama(), end=None))
    path = folder(tmp_path / "other", llama())
    (path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    with pytest.raises(ConfigError, match="'t5' is no causal language model"):
        build(path)
    short = folder(tmp_path / "short", llama())
    (short / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="weights do not fit the model"):
        build(short)
