"""Tiny language models of random weights, in folders as transformers writes them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from diptych.config import from_tree
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_MODEL

WORDS = ["a", "x", "of", "the", "red", "fox", "caption", "cat", "in", "snow", "!"]
VOCABULARY = ["<s>", "<e>", *WORDS]
SIZE = {"vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
ROTARY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2() -> Any:
    """Absolute positions; words in and out by one matrix; no dropout, which differs from rank to rank."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2} | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **SIZE))


def llama() -> Any:
    """Rotary positions; a head of its own."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY, **SIZE, tie_word_embeddings=False))


def gemma() -> Any:
    """Scaled embeddings, capped logits."""
    keys = ROTARY | {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.5}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**keys, **SIZE))


def folder(path: Path, model: Any, *, starts: bool = False, start: str = "<s>") -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that each token is felt
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{start} $A", special_tokens=[(start, VOCABULARY.index(start))]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="!", bos_token=start, eos_token="<e>"
    )
    fast.save_pretrained(path)
    return path


def tree(path: Path, **keys: Any) -> dict[str, Any]:
    towers = {"type": "language_model", "image": TINY_MODEL["towers"], "name": str(path), "context_length": 16}
    return {"towers": towers | {"prefix_tokens": 3} | keys.pop("towers", {})} | keys


def build(path: Path, **keys: Any) -> DualEncoder:
    return dual_encoder.build(from_tree(ModelConfig, tree(path, **keys)), seed=0).eval()


def trimmed(model: DualEncoder, texts: list[str]) -> Tensor:
    tokens = model.tokenizer(texts)
    return tokens[:, : int((tokens != 0).any(0).nonzero().max()) + 1]
