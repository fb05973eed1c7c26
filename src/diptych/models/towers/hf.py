"""Towers from transformers: any dual encoder with `get_image_features` and `get_text_features` (CLIP, SigLIP, …).

In a batch 0 is padding, and the columns that hold nothing else are cut (data/tokens.py). To transformers' tokenizers 0
is a word like others, and padding is some other id. So ids travel one higher than they are; the text tower takes the
one off again, and puts back the padding and the mask that the model was trained with.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from diptych.errors import CheckpointError, ConfigError, one_line
from diptych.models.towers.family import BuiltTowers, CachedTokenizer, Pixels, Towers, padded_with

log = logging.getLogger(__name__)

_BILINEAR = 2
_CAUSAL = frozenset({"clip", "metaclip_2"})
"""Types whose texts are pooled behind a causal mask: what stands to the right of the caption changes nothing."""
_MASKED = frozenset({"align", "altclip", "chinese_clip"})
"""Types whose texts are pooled at the first token: with a mask, padding changes nothing. All others get it back."""
_READ_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class HfTowers(Towers, name="hf"):
    """Both towers of a dual encoder of transformers: CLIP, SigLIP, AltCLIP, ChineseCLIP, …"""

    name: str
    """A name on the hub (`google/siglip-base-patch16-224`) or a folder that transformers wrote, with tokenizer and
    image processor. Code that a repository brings is not run."""
    weights: Literal["published", "random"] = "published"
    """`published`: those that lie with the configuration, from safetensors files; `random`: new ones."""
    context_length: int | None = None
    """Tokens of a caption, longer ones are cut; none: as many as tokenizer and model take."""

    def build(self) -> BuiltTowers:
        """See Towers. Raises ConfigError for what is no dual encoder, CheckpointError for unusable weights."""
        from transformers import AutoConfig, AutoTokenizer

        with refusing(f"transformers cannot open {self.name!r}"):
            config = AutoConfig.from_pretrained(self.name, trust_remote_code=False)
            theirs = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
        padding = _padding(theirs, config.model_type)
        tokenizer = CachedTokenizer(_one_higher(theirs), self._tokens(theirs, config), _decoder(theirs))
        pixels = _pixels(self.name, config)
        model = self._model(config)
        image_tower, text_tower = ImageTower(model), TextTower(model, padding, tokenizer.context_length)
        width = _divide(image_tower, text_tower, pixels.size, tokenizer)
        published = self.weights == "published"
        return BuiltTowers(
            image_tower=image_tower.train(),
            text_tower=text_tower.train(),
            tokenizer=tokenizer,
            embed_dim=width,
            pixels=pixels,
            logit_scale=_logit_scale(model) if published else None,
            logit_bias=_number(model, "logit_bias") if published else None,
            open_clip_config=None,
        )

    def reference(self) -> str | None:
        """See Towers."""
        return f"hf:{self.name}" if self.weights == "published" and self.context_length is None else None

    def _model(self, config: Any) -> nn.Module:
        from transformers import AutoModel

        if self.weights == "random":
            with refusing(f"transformers cannot build {self.name!r}"):
                model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        else:
            try:
                model, report = AutoModel.from_pretrained(
                    self.name,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
            except Exception as error:  # whatever a damaged or foreign file makes of the readers
                raise CheckpointError(f"weights do not fit the model ({one_line(error)}) · {self.name}") from error
            if absent := sorted(report["missing_keys"]):
                raise CheckpointError(f"{len(absent)} weights are absent, {absent[0]} the first · {self.name}")
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise ConfigError(
                f"{type(model).__name__} is no dual encoder of pictures and texts · model.towers.name · "
                "for single towers see `type: pair`, and `hf_model_name` in `text` of `type: open_clip`"
            )
        return model.eval()

    def _tokens(self, theirs: Any, config: Any) -> int:
        limits = (theirs.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None))
        limit = min(limit for limit in limits if limit is not None)
        length = self.context_length if self.context_length is not None else limit
        if not 1 <= length <= min(limit, 1 << 20):  # where nobody knows, transformers says 10^30
            raise ConfigError(f"captions cannot have {length} tokens, at most {limit} · model.towers.context_length")
        return int(length)


@dataclass(frozen=True)
class Padding:
    """What a text tower is to see behind its captions."""

    id: int
    masked: bool
    """Whether the model is told what is padding."""
    whole: bool
    """Whether features depend on it, so that captions are filled up to the context length."""


class ImageTower(nn.Module):
    """The half of a dual encoder that sees pictures."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B D"]:
        """Projected features, not normalised."""
        return _pooled(self.model.get_image_features(pixel_values=images))  # type: ignore[operator]


class TextTower(nn.Module):
    """The half of a dual encoder that reads: exact for captions whose common padding was cut."""

    def __init__(self, model: nn.Module, padding: Padding, context_length: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self.context_length = context_length

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Projected features, not normalised, of ids that are one higher than the model's."""
        if self.padding.whole:
            tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1]))
        ids = padded_with(tokens, self.padding.id)
        mask = (tokens != 0).long() if self.padding.masked else None
        return _pooled(self.model.get_text_features(input_ids=ids, attention_mask=mask))  # type: ignore[operator]


def _pooled(output: Any) -> Tensor:
    return getattr(output, "pooler_output", output)  # before transformers 5 the features themselves


def _padding(theirs: Any, model_type: str) -> Padding:
    if theirs.pad_token_id is None or theirs.padding_side != "right":
        raise ConfigError(
            "the tokenizer does not pad on the right · model.towers.name · give its files a padding token"
        )
    masked = "attention_mask" in theirs.model_input_names
    exact = model_type in _CAUSAL or (masked and model_type in _MASKED)
    # Behind a causal mask another one changes nothing, and attention is faster without.
    return Padding(theirs.pad_token_id, masked=masked and model_type not in _CAUSAL, whole=not exact)


def _one_higher(theirs: Any) -> Callable[[Sequence[str], int], Int[Tensor, "B L"]]:
    def encode(texts: Sequence[str], context_length: int) -> Int[Tensor, "B L"]:
        rows = theirs(list(texts), truncation=True, max_length=context_length).input_ids
        found = torch.zeros(len(rows), context_length, dtype=torch.long)
        for row, ids in zip(found, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids) + 1
        return found

    return encode


def _decoder(theirs: Any) -> Callable[[Sequence[int]], str]:
    return lambda ids: theirs.decode(ids)


def _pixels(name: str, config: Any) -> Pixels:
    from transformers import AutoImageProcessor

    try:
        theirs = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if not hasattr(config, "vision_config"):
            raise ConfigError(
                f"neither an image processor nor an image tower, {config.model_type!r} is no dual encoder · {name} · "
                "name a model of pictures and texts"
            ) from error
        log.warning("no image processor, pixels are normalised as CLIP's name=%s", name)
        return Pixels(config.vision_config.image_size)
    squash, resized = "height" in theirs.size, _side(theirs.size)
    normalised = bool(theirs.do_normalize)
    return Pixels(
        _side(theirs.crop_size) if getattr(theirs, "do_center_crop", False) else resized,
        tuple(theirs.image_mean) if normalised else (0.0, 0.0, 0.0),
        tuple(theirs.image_std) if normalised else (1.0, 1.0, 1.0),
        squash=squash,
        before_crop=resized,
        interpolation="bilinear" if theirs.resample == _BILINEAR else "bicubic",
    )


def _side(size: Any) -> int:
    return int(size["height"] if "height" in size else size["shortest_edge"])


def _divide(image_tower: ImageTower, text_tower: TextTower, size: int, tokenizer: CachedTokenizer) -> int:
    """Leaves each tower its half of the model they share; the width of their features.

    Which half that is, one picture and one caption of full length show: whatever their features do not depend on.
    """
    with refusing("transformers' model does not embed a picture and a text"), torch.enable_grad():
        seen = image_tower(torch.zeros(1, 3, size, size))
        read = text_tower(tokenizer(["a " * tokenizer.context_length]))
        if seen.ndim != 2 or seen.shape != read.shape:
            raise ValueError(f"its features have the shapes {list(seen.shape)} and {list(read.shape)}")
    image_tower.model, text_tower.model = _half(image_tower.model, seen), _half(text_tower.model, read)
    return int(seen.shape[1])


def _half(model: nn.Module, features: Tensor) -> nn.Module:
    """The model without the parts and parameters that the features do not depend on; what is left is shared.

    Where a part that is used has parameters that are not (a mask token, a pooler that nobody asks), they become
    buffers: gradients are averaged only when each parameter has one.
    """
    used = _origins(features)
    half = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, part in list(half.named_children()):
        parameters = list(part.parameters())
        if parameters and not any(parameter in used for parameter in parameters):
            delattr(half, name)
    for module in half.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in used:
                delattr(module, name)
                if module is not half:
                    module.register_buffer(name, parameter.detach())
    return half


def _origins(result: Tensor) -> set[Tensor]:
    """The parameters that a tensor was computed from."""
    found: set[Tensor] = set()
    met: set[Any] = set()
    ahead: list[Any] = [result.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in met:
            met.add(node)
            found |= {node.variable} if hasattr(node, "variable") else set()
            ahead += [following for following, _ in node.next_functions]
    return found


def _logit_scale(model: nn.Module) -> float | None:
    temperature = _number(model, "temperature")  # ALIGN's; cosines are divided by it
    return _number(model, "logit_scale") if temperature is None else -math.log(temperature)


def _number(model: nn.Module, name: str) -> float | None:
    parameter = getattr(model, name, None)
    return float(parameter.item()) if parameter is not None else None


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Raises ConfigError, in one line, for what transformers makes of settings that it cannot use."""
    try:
        yield
    except (*_READ_ERRORS, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{what} ({one_line(error)}) · model.towers") from error
