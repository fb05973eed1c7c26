"""Towers from open_clip's model factory: any of its configurations, changed where asked, random or public weights."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Int
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg, CustomTextCLIP, convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import TextTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.errors import CheckpointError, ConfigError, one_line
from diptych.models.towers.bpe import BpeTokenizer
from diptych.models.towers.decoder import CaptionDecoder, check_fit
from diptych.models.towers.family import (
    BuiltTowers,
    CachedTokenizer,
    Captioner,
    Pixels,
    Spelling,
    TextTokenizer,
    Towers,
    padded_with,
)
from diptych.models.towers.resize import OtherPositions

_CONFIG_FILE, _WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
_MODEL_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "init_logit_bias")

_ALIKE = ("context_length", "vocab_size", "width", "heads", "layers")


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
    multimodal: dict[str, Any] = field(default_factory=dict)
    """Keys of open_clip's `multimodal_cfg` that differ from the named model's; where there are any, the model is a
    captioner (CoCa): a decoder, `text_decoder`, writes captions. What is not said of it is as in `text`."""
    weights: str | None = None
    """A tag that open_clip knows for this name (`openai`, `laion2b_s34b_b79k`), or a local .safetensors/.pt file."""
    image_weights: Path | None = None
    """A local .safetensors/.pt file with weights of the image tower alone, under the names that the model of
    `vision.timm_model_name` has in timm; a classifier in it is left out."""

    def build(self) -> BuiltTowers:
        """See Towers. Raises ConfigError for keys open_clip does not take, CheckpointError for unusable weights."""
        config = self.resolved()
        try:
            model = _model(config)
        except (TypeError, RuntimeError, ValueError, AssertionError, OSError) as error:
            raise ConfigError(f"open_clip cannot build this model ({one_line(error)}) · model.towers") from error
        published = self._load_weights(model)
        if self.image_weights is not None:
            _load_image_weights(model.visual, self.image_weights)
        wanted = published
        if self.image_weights is not None or self.vision.get("timm_model_pretrained"):
            wanted = getattr(getattr(model.visual, "trunk", None), "pretrained_cfg", {}) | published
        tokenizer = _tokenizer(model.text, config["text_cfg"])
        captioner = None
        if isinstance(decoder := getattr(model, "text_decoder", None), CaptionDecoder):
            check_fit(model.visual, model.text, decoder)
            captioner = Captioner(decoder, _spelling(config["text_cfg"]), width=decoder.width)
        _accept_trimmed_tokens(model.text)
        size = model.visual.image_size
        return BuiltTowers(
            image_tower=model.visual,
            text_tower=model.text,
            tokenizer=tokenizer,
            embed_dim=config["embed_dim"],
            pixels=_pixels(size if isinstance(size, int) else size[0], wanted),
            logit_scale=model.logit_scale.item() if published else None,
            logit_bias=model.logit_bias.item() if published and model.logit_bias is not None else None,
            open_clip_config=config,
            captioner=captioner,
        )

    def reference(self) -> str | None:
        """See Towers."""
        changed = self.embed_dim or self.vision or self.text or self.multimodal or self.image_weights
        if changed or self.name is None or not (self.weights or Path(self.name).is_dir()):
            return None
        return f"open_clip:{self.name}" + (f":{self.weights}" if self.weights else "")

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
        """The complete open_clip configuration: `embed_dim`, `vision_cfg`, `text_cfg` and, where set, `quick_gelu` and
        `multimodal_cfg`."""
        config = _named_config(self.name) if self.name is not None else {"vision_cfg": {}, "text_cfg": {}}
        config = {key: config[key] for key in _MODEL_KEYS if key in config}
        config["vision_cfg"] |= self.vision
        config["text_cfg"] |= self.text
        if self.multimodal or "multimodal_cfg" in config:
            alike = {key: config["text_cfg"][key] for key in _ALIKE if key in config["text_cfg"]}
            config["multimodal_cfg"] = alike | config.get("multimodal_cfg", {}) | self.multimodal
        for part in ("vision_cfg", "text_cfg"):  # what open_clip's captioner counts on, and nothing else takes
            if "multimodal_cfg" in config or "output_tokens" in config[part]:
                config[part]["output_tokens"] = "multimodal_cfg" in config
        if self.embed_dim is not None:
            config["embed_dim"] = self.embed_dim
        if self.weights == "openai":
            config["quick_gelu"] = True
        if "embed_dim" not in config:
            raise ConfigError("embed_dim is missing · model.towers · name an open_clip model or give embed_dim")
        return config


def _model(config: dict[str, Any]) -> CustomTextCLIP:
    """Both towers and, for a captioner, `text_decoder` beside them: open_clip's `CoCa`, name by name."""
    towers = {key: value for key, value in config.items() if key != "multimodal_cfg"}
    model = CustomTextCLIP(**towers)
    if "multimodal_cfg" in config:
        vocab_size = config["text_cfg"].get("vocab_size", CLIPTextCfg.vocab_size)
        quick_gelu = bool(config.get("quick_gelu"))
        model.text_decoder = CaptionDecoder(config["multimodal_cfg"], vocab_size=vocab_size, quick_gelu=quick_gelu)
    return model.float()  # texts of transformers come in the precision of their files


def _pixels(size: int, wanted: Mapping[str, Any]) -> Pixels:
    """As open_clip's or timm's description of weights says. Raises ConfigError for pictures with borders."""
    if wanted.get("resize_mode", "shortest") not in ("shortest", "squash"):
        raise ConfigError(
            f"pictures are not padded to a square (resize_mode {wanted['resize_mode']!r}) · model.towers · "
            "use weights of resize_mode shortest or squash"
        )
    return Pixels(
        size,
        tuple(wanted.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        tuple(wanted.get("std", open_clip.OPENAI_DATASET_STD)),
        squash=wanted.get("resize_mode") == "squash",
        interpolation="bilinear" if wanted.get("interpolation") == "bilinear" else "bicubic",
    )


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
        raise ConfigError(f"model file not readable ({one_line(error)}) · model.towers.name · {path}") from error


def _load_file(model: CustomTextCLIP, path: Path) -> None:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        state = convert_to_custom_text_state_dict(state.get("state_dict", state))
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except Exception as error:  # whatever a damaged or foreign file makes of the readers
        raise CheckpointError(f"weights do not fit the model ({one_line(error)}) · {path}") from error


def _load_image_weights(image_tower: nn.Module, path: Path) -> None:
    """Fills a timm model but for its classifier, which is the tower's new projection or not there at all."""
    if not isinstance(image_tower, TimmModel):
        raise ConfigError("image_weights are those of a timm model · model.towers · name it in vision.timm_model_name")
    trunk = image_tower.trunk
    named = trunk.pretrained_cfg["classifier"]
    heads = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named or []))
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        new = {key: value for key, value in trunk.state_dict().items() if key.startswith(heads)}
        trunk.load_state_dict({key: value for key, value in state.items() if not key.startswith(heads)} | new)
    except Exception as error:  # whatever a damaged or foreign file makes of the readers
        raise CheckpointError(f"image_weights do not fit the model ({one_line(error)}) · {path}") from error


def _accept_trimmed_tokens(text_tower: nn.Module) -> None:
    """Lets a text tower take [B, L] with L below its context length, with the same features.

    open_clip hands its transformer the mask of the whole context. Behind a causal mask with end-of-text pooling the
    padding to the right changes nothing, so the mask is cut to the tokens that came. Where features depend on the
    padding (SigLIP pools the last place and has no mask), it is put back; of what stands before CoCa's class token,
    one place of it.
    """

    def fill(tower: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (F.pad(args[0], (0, tower.context_length - args[0].shape[1])),)

    def cut_mask(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask, length = kwargs.get("attn_mask"), args[0].shape[1]
        if mask is not None and mask.shape[-1] != length:
            kwargs = kwargs | {"attn_mask": mask[..., :length, :length]}
        return args, kwargs

    if isinstance(text_tower, TextTransformer):
        if text_tower.cls_emb is not None:
            # A bound method, not a closure: a deep copy of the tower (the averaged model) gets its own.
            text_tower._embeds = MethodType(_embeds_before_class, text_tower)
        elif text_tower.attn_mask is None or text_tower.pool_type == "last":
            text_tower.register_forward_pre_hook(fill)
        else:
            text_tower.transformer.register_forward_pre_hook(cut_mask, with_kwargs=True)


def _embeds_before_class(tower: Any, text: Int[Tensor, "B L"]) -> tuple[Tensor, Tensor | None]:
    """In place of a text tower's own, whose class token stands behind the whole context, and has that place's position.

    open_clip's mask, shifted by one place (see `correct_cls_mask`), hides all padding from it but the first one, and
    hides it from itself where there is any. One place of padding gives the same.
    """
    length = text.shape[1]
    if length >= tower.context_length:
        return TextTransformer._embeds(tower, text)
    positions = tower.positional_embedding
    if length + 1 < tower.context_length:
        positions = torch.cat([positions[: length + 1], positions[-1:]])
    embedded, mask = TextTransformer._embeds(OtherPositions(tower, positions), F.pad(text, (0, 1)))
    return embedded, mask


def _tokenizer(text_tower: nn.Module, text_cfg: dict[str, Any]) -> TextTokenizer:
    """The tower's tokeniser; where it pads with another id than 0, the tower is made to take `_OneHigher`'s."""
    tokenizer = build_tokenizer(text_cfg)
    pad = text_tower.config.pad_token_id if isinstance(text_tower, HFTextEncoder) else 0
    if not pad:
        return tokenizer

    def restore(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (padded_with(args[0], pad),)

    text_tower.register_forward_pre_hook(restore)
    return _OneHigher(tokenizer, pad)


class _OneHigher:
    """Ids that are one higher than a text tower of transformers knows them, padded with 0: RoBERTa's 0 begins a
    caption, and its padding is 1."""

    def __init__(self, tokenizer: TextTokenizer, pad: int) -> None:
        self.context_length = tokenizer.context_length
        self._theirs, self._pad = tokenizer, pad

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids [B, context_length]."""
        tokens = self._theirs(texts)
        return torch.where(tokens == self._pad, 0, tokens + 1)

    def word(self, row: int) -> str:
        """See TextTokenizer; rows are those of the tower, whose ids are not one higher."""
        return self._theirs.word(row)


def build_tokenizer(text_cfg: dict[str, Any]) -> TextTokenizer:
    """The tokeniser that an open_clip `text_cfg` asks for."""
    length = text_cfg.get("context_length", 77)
    keywords = text_cfg.get("tokenizer_kwargs") or {}
    source = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    if source:
        try:
            tokenizer = HFTokenizer(source, context_length=length, **keywords)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(
                f"tokenizer {source!r} cannot be opened ({one_line(error)}) · model.towers.text"
            ) from error
    else:
        tokenizer = open_clip.SimpleTokenizer(context_length=length, **keywords)
        if tokenizer.reduction_fn is None:
            return BpeTokenizer(tokenizer, length)
    return CachedTokenizer(tokenizer, length, tokenizer.tokenizer.decode if source else tokenizer.decode)


def _spelling(text_cfg: dict[str, Any]) -> Spelling:
    """How ids of `build_tokenizer` are written out."""
    room = text_cfg.get("context_length", CLIPTextCfg.context_length) - 1
    if text_cfg.get("hf_tokenizer_name"):
        theirs = HFTokenizer(text_cfg["hf_tokenizer_name"], **(text_cfg.get("tokenizer_kwargs") or {})).tokenizer
        start = theirs.bos_token_id if theirs.bos_token_id is not None else theirs.cls_token_id
        end = theirs.eos_token_id if theirs.eos_token_id is not None else theirs.sep_token_id
        return Spelling(
            (start,), end, room, (0, start), lambda ids: theirs.decode(ids, skip_special_tokens=True).strip()
        )
    tokenizer = open_clip.SimpleTokenizer()
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    return Spelling(
        (start,), end, room, (0, start), lambda ids: tokenizer.decode([i for i in ids if i not in (start, end)]).strip()
    )
