"""Two graphs that onnxruntime runs, without torch or Python: pixels in, tokens in, unit-norm features out.

FOLDER/
  image.onnx        `pixels` uint8 [batch, 3, size, size] to `features` float32 [batch, D]; normalisation is inside
  text.onnx         `tokens` int64 [batch, context_length], 0 behind the caption, to `features` float32 [batch, D]
  tokenizer.json    for the tokenizers library, where there is such a form of the model's tokenizer
  README.md         the model card

Weights of more than a gigabyte lie in image.onnx.data and text.onnx.data: a graph's file cannot hold two.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from tokenizers import Tokenizer
from torch import Tensor, nn

from diptych.errors import ConfigError, one_line
from diptych.export import card, clip_tokenizer
from diptych.export.check import Difference, Peer, as_used, compare
from diptych.export.folder import building
from diptych.models.dual_encoder import DualEncoder
from diptych.models.towers import hf
from diptych.models.towers.bpe import BpeTokenizer

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGE = 1 << 30
"""Bytes of weights from which they lie in a file of their own."""
_USAGE = """
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("FOLDER/tokenizer.json")
found = tokenizer.encode_batch(["a red fox", "a blue whale"])
tokens = TOKENS
pixels = np.zeros((1, 3, SIZE, SIZE), np.uint8)  # RGB: shorter side to SIZE, centre crop
(image,) = onnxruntime.InferenceSession("FOLDER/image.onnx").run(None, {"pixels": pixels})
(texts,) = onnxruntime.InferenceSession("FOLDER/text.onnx").run(None, {"tokens": tokens})
print(image @ texts.T)
"""
_TOKENS = "np.array([caption.ids for caption in found])"
_ONE_HIGHER = f"({_TOKENS} + 1) * np.array([caption.attention_mask for caption in found])"
_NO_TOKENIZER = "The tokenizer has no file here: tokens are those of `diptych.load(NAME).model.tokenizer`."


def export(
    model: DualEncoder, folder: Path, *, origin: card.Origin = card.UNKNOWN, overwrite: bool = False
) -> Difference:
    """Writes the model; returns how far onnxruntime's features are from its own.

    Raises:
        ConfigError: packages are absent, or torch cannot write these towers as a graph.
        DataError: the folder is not empty and `overwrite` is off.
        CheckpointError: onnxruntime gives other features.
    """
    if absent := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"not installed ({', '.join(absent)}) · export to onnx · pip install 'diptych[onnx]'")
    with building(folder, overwrite=overwrite) as unfinished:
        size, length = model.image_size, model.tokenizer.context_length
        with as_used(model), torch.no_grad():
            # Two of each: an axis of one would be taken for a constant.
            _write(_Image(model), "pixels", torch.zeros(2, 3, size, size, dtype=torch.uint8), unfinished / "image.onnx")
            _write(_Text(model), "tokens", torch.ones(2, length, dtype=torch.long), unfinished / "text.onnx")
        words = _words(model)
        if words is not None:
            words.tokenizer.save(str(unfinished / "tokenizer.json"))
        card.write(unfinished, model, _library(model, words), origin)
        return compare(model, _opened(unfinished, model, words))


class _Image(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B D"]:
        return self.model.encode_image(pixels)


class _Text(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        return self.model.encode_text(tokens)


def _write(graph: _Image | _Text, name: str, example: Tensor, path: Path) -> None:
    tower = graph.model.image_tower if isinstance(graph, _Image) else graph.model.text_tower
    size = sum(parameter.numel() * parameter.element_size() for parameter in tower.parameters())
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch's parts say to one another
            torch.onnx.export(
                graph.eval(),
                (example.to(graph.model.logit_scale.device),),
                str(path),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[name],
                output_names=["features"],
                external_data=size > _LARGE,
                verbose=False,
            )
    except Exception as error:  # whatever a tower's own code makes of the tracer
        reason = one_line(error.__cause__ or error)  # torch's own message is pages of advice
        raise ConfigError(f"torch cannot write this tower as a graph ({reason}) · {name} · model.towers") from error


@dataclass(frozen=True)
class _Words:
    """A tokenizer that pads and cuts as the text graph wants it."""

    tokenizer: Tokenizer
    one_higher: bool
    """Whether a token is its id plus one, so that 0 is free for padding (see towers/hf.py)."""

    def tokens(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """What text.onnx takes."""
        found = self.tokenizer.encode_batch(list(texts))
        ids, mask = (torch.tensor([getattr(one, name) for one in found]) for name in ("ids", "attention_mask"))
        return (ids + 1) * mask if self.one_higher else ids


def _words(model: DualEncoder) -> _Words | None:
    """None where the tokenizer is code alone."""
    length = model.tokenizer.context_length
    if isinstance(model.text_tower, hf.TextTower):
        tokenizer = _original(model.text_tower)
    elif isinstance(model.tokenizer, BpeTokenizer) and not _cleaned_otherwise(model):
        tokenizer = clip_tokenizer.build()
    else:
        return None
    if tokenizer is None:
        return None
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0)
    return _Words(tokenizer, one_higher=isinstance(model.text_tower, hf.TextTower))


def _original(tower: hf.TextTower) -> Tokenizer | None:
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(tower.model.config.name_or_path, trust_remote_code=False)  # type: ignore[union-attr]
    return theirs.backend_tokenizer if theirs.is_fast else None


def _cleaned_otherwise(model: DualEncoder) -> bool:
    text = (model.open_clip_config or {}).get("text_cfg", {})
    return bool(text.get("tokenizer_kwargs"))


def _library(model: DualEncoder, words: _Words | None) -> card.Library:
    tokens = _ONE_HIGHER if words is not None and words.one_higher else _TOKENS
    usage = _USAGE.replace("SIZE", str(model.image_size)).replace("TOKENS", tokens)
    return card.Library("onnx", "onnxruntime", usage, () if words is not None else (_NO_TOKENIZER,))


def _opened(folder: Path, model: DualEncoder, words: _Words | None) -> Peer:
    import onnxruntime

    def run(name: str, inputs: dict[str, Any]) -> Tensor:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, inputs)[0])

    tokens = words.tokens if words is not None else model.tokenizer
    return Peer(
        lambda images: run("image", {"pixels": images.numpy()}),
        lambda texts: run("text", {"tokens": tokens(texts).numpy()}),
    )
