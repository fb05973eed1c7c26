"""Towers from open_clip's model factory: any of its configurations, changed where asked, random or public weights."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Int
from open_clip.model import CustomTextCLIP, convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from open_clip.transformer import Transformer
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.errors import CheckpointError, ConfigError
from diptych.models.towers.bpe import BpeTokenizer
from diptych.models.towers.family import BuiltTowers, TextTokenizer, Towers

_CONFIG_FILE, _WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
_MODEL_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias")


@dataclass(frozen=True)
class OpenClipTowers(Towers, name="open_clip"):
    """Both towers of an open_clip model."""

    name: str | None = None
    """An open_clip model name (`ViT-B-32`), a JSON file in its form, or a folder that `diptych export` or open_clip
    wrote, weights included; none: `embed_dim`, `vision` and `text` say all."""
    embed_dim: int | None = None
    """Width D of the shared space; none: the named model's."""
    vision: dict[str, Any] = field(default_factory=dict)
    """Keys of open_clip's `vision_cfg` that differ from the named model's."""
    text: dict[str, Any] = field(default_factory=dict)
    """Keys of open_clip's `text_cfg` that differ from the named model's."""
    weights: str | None = None
    """A tag that open_clip knows for this name (`openai`, `laion2b_s34b_b79k`), or a local .safetensors/.pt file."""

    def build(self) -> BuiltTowers:
        """See Towers. Raises ConfigError for keys open_clip does not take, CheckpointError for unusable weights."""
        config = self.resolved()
        try:
            model = CustomTextCLIP(**config)
        except (TypeError, RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"open_clip cannot build this model ({_line(error)}) · model.towers") from error
        published = self._load_weights(model)
        mean = published.get("mean", open_clip.OPENAI_DATASET_MEAN)
        std = published.get("std", open_clip.OPENAI_DATASET_STD)
        _accept_trimmed_tokens(model.text)
        size = model.visual.image_size
        return BuiltTowers(
            image_tower=model.visual,
            text_tower=model.text,
            tokenizer=build_tokenizer(config["text_cfg"]),
            embed_dim=config["embed_dim"],
            image_size=size if isinstance(size, int) else size[0],
            image_mean=tuple(mean),
            image_std=tuple(std),
            logit_scale=model.logit_scale.item() if published else None,
            logit_bias=model.logit_bias.item() if published and model.logit_bias is not None else None,
            open_clip_config=config,
        )

    def _load_weights(self, model: CustomTextCLIP) -> dict[str, Any]:
        """Fills the model where weights are named; how they want their pixels, and where they lay."""
        if self.weights is not None:
            published = dict(get_pretrained_cfg(self.name, self.weights)) if self.name is not None else {}
            path = Path(download_pretrained(published)) if published else Path(self.weights)
        elif self.name is not None and Path(self.name).is_dir():
            published = dict(_json(Path(self.name) / _CONFIG_FILE).get("preprocess_cfg", {}))
            path = Path(self.name) / _WEIGHTS_FILE
        else:
            return {}
        if not path.is_file():
            raise CheckpointError(
                f"weights {self.weights or path.name!r} are neither a tag of {self.name!r} nor a file · "
                "model.towers.weights"
            )
        _load_file(model, path)
        return published | {"file": str(path)}

    def resolved(self) -> dict[str, Any]:
        """The complete open_clip configuration: `embed_dim`, `vision_cfg`, `text_cfg` and, where set, `quick_gelu`."""
        config = _named_config(self.name) if self.name is not None else {"vision_cfg": {}, "text_cfg": {}}
        config = {key: config[key] for key in _MODEL_KEYS if key in config}
        config["vision_cfg"] |= self.vision
        config["text_cfg"] |= self.text
        if self.embed_dim is not None:
            config["embed_dim"] = self.embed_dim
        if self.weights == "openai":
            config["quick_gelu"] = True
        if "embed_dim" not in config:
            raise ConfigError("embed_dim is missing · model.towers · name an open_clip model or give embed_dim")
        return config


def _named_config(name: str) -> dict[str, Any]:
    if name.endswith(".json") or Path(name).is_dir():
        document = _json(Path(name) / _CONFIG_FILE if Path(name).is_dir() else Path(name))
        return dict(document.get("model_cfg", document))
    config = open_clip.get_model_config(name)
    if config is None:
        from difflib import get_close_matches

        close = get_close_matches(name, open_clip.list_models(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see open_clip.list_models()"
        raise ConfigError(f"open_clip has no model {name!r} · model.towers.name · {hint}")
    return copy.deepcopy(config)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model file not readable ({_line(error)}) · model.towers.name · {path}") from error


def _load_file(model: CustomTextCLIP, path: Path) -> None:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        state = convert_to_custom_text_state_dict(state.get("state_dict", state))
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except Exception as error:  # whatever a damaged or foreign file makes of the readers
        raise CheckpointError(f"weights do not fit the model ({_line(error)}) · {path}") from error


def _accept_trimmed_tokens(text_tower: nn.Module) -> None:
    """Lets a causal text tower take [B, L] with L below its context length, with the same features.

    open_clip hands its transformer the mask of the whole context. Behind a causal mask with end-of-text pooling the
    padding to the right changes nothing, so the mask is cut to the tokens that came.
    """

    def cut_mask(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask, length = kwargs.get("attn_mask"), args[0].shape[1]
        if mask is not None and mask.shape[-1] != length:
            kwargs = kwargs | {"attn_mask": mask[..., :length, :length]}
        return args, kwargs

    transformer = getattr(text_tower, "transformer", None)
    if isinstance(transformer, Transformer):
        transformer.register_forward_pre_hook(cut_mask, with_kwargs=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class CachedTokenizer:
    """A tokenizer that remembers the captions it has seen: small data sets repeat theirs every epoch."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.context_length = context_length
        self._one = lru_cache(maxsize=65536)(lambda text: tokenizer([text], context_length=context_length)[0])

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids [B, context_length], padded with 0."""
        return torch.stack([self._one(text) for text in texts])


def build_tokenizer(text_cfg: dict[str, Any]) -> TextTokenizer:
    """The tokeniser that an open_clip `text_cfg` asks for."""
    length = text_cfg.get("context_length", 77)
    keywords = text_cfg.get("tokenizer_kwargs") or {}
    source = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    if source:
        tokenizer = open_clip.HFTokenizer(source, context_length=length, **keywords)
    else:
        tokenizer = open_clip.SimpleTokenizer(context_length=length, **keywords)
        if tokenizer.reduction_fn is None:
            return BpeTokenizer(tokenizer, length)
    return CachedTokenizer(tokenizer, length)
