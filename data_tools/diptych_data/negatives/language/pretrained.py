"""The door to transformers: models of a folder or a hub's name; no code of theirs runs, no pickle is opened."""

from typing import Any, Literal

import torch

from diptych.errors import ConfigError

Head = Literal["fill_mask", "causal", "seq2seq"]


def load_model(name: str, head: Head, device: str) -> tuple[Any, Any]:
    """(tokenizer, model in evaluation mode on `device`).

    Raises:
        ConfigError: there is no such model, or not as safetensors.
    """
    import transformers

    classes = {
        "fill_mask": transformers.AutoModelForMaskedLM,
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = classes[head].from_pretrained(name, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"no {head} model ({first}) · {name} · a folder with safetensors, or a hub's name") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer, model.eval().to(torch.device(device))


def causal_or_seq2seq(name: str) -> Head:
    """Which of the two a model is. Raises ConfigError."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no language model · {name} · a folder with config.json, or a hub's name") from error
    return "seq2seq" if config.is_encoder_decoder else "causal"
