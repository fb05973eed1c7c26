"""A folder that transformers opens with `AutoModel` and `AutoProcessor`.

FOLDER/
  config.json, model.safetensors     a CLIPModel; of towers of `type: hf` the model that they were
  preprocessor_config.json           pictures: shorter side to size, centre crop, mean and deviation
  tokenizer.json, …                  see clip_tokenizer.py
  README.md                          the model card
"""

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.export import card, clip_tokenizer, clip_weights
from diptych.export.check import Difference, Peer, compare
from diptych.export.folder import building
from diptych.models.dual_encoder import DualEncoder
from diptych.models.towers import hf

log = logging.getLogger(__name__)

_USAGE = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("FOLDER").eval(), AutoProcessor.from_pretrained("FOLDER")
inputs = processor(
    images=[Image.open("picture.jpg").convert("RGB")],
    text=["a red fox", "a blue whale"],
    padding="max_length",
    truncation=True,
    return_tensors="pt",
)
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(-1))
"""
_NO_BIAS = (
    "Trained with a logit bias, for which this class of transformers has no place: features and softmax are the same"
)


def export(
    model: DualEncoder, folder: Path, *, origin: card.Origin = card.UNKNOWN, overwrite: bool = False
) -> Difference:
    """Writes the model; returns how far the features are from its own when transformers opens the folder again.

    Raises:
        ConfigError: transformers cannot express these towers; the message names the property.
        DataError: the folder is not empty and `overwrite` is off.
        CheckpointError: what transformers opens gives other features.
    """
    of_transformers = isinstance(model.image_tower, hf.ImageTower) and isinstance(model.text_tower, hf.TextTower)
    if not of_transformers:
        clip_weights.refuse(model)
    with building(folder, overwrite=overwrite) as unfinished:
        theirs = _original(model) if of_transformers else _clip(model)
        notes = _notes(model, theirs)
        for note in notes:
            log.warning("%s", note)
        theirs.save_pretrained(unfinished)
        if of_transformers:
            _write_original_inputs(model, theirs.config, unfinished)
        else:
            clip_tokenizer.write(unfinished, model.tokenizer.context_length)
            _image_processor(model).save_pretrained(unfinished)
        library = card.Library("transformers", "transformers", _USAGE, notes)
        card.write(unfinished, model, library, origin)
        return compare(model, _opened(unfinished))


def _notes(model: DualEncoder, theirs: nn.Module) -> tuple[str, ...]:
    if model.logit_bias is None or hasattr(theirs, "logit_bias"):
        return ()
    return (f"{_NO_BIAS} (bias={model.logit_bias.item():.4g}).",)


def _clip(model: DualEncoder) -> Any:
    from transformers import CLIPModel

    with torch.device("meta"):  # no weights are drawn, none are twice in memory
        theirs = CLIPModel(clip_weights.config(model))
    theirs.load_state_dict(clip_weights.state(model), assign=True)
    return theirs


def _original(model: DualEncoder) -> Any:
    """The model whose halves the two towers are, with their weights."""
    halves: list[Any] = [model.text_tower.model, model.image_tower.model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what neither tower uses is in no checkpoint
        whole: Any = type(halves[0])(halves[0].config)
    # Parameters last: what one half does not train may lie in it as a stale buffer (see `_half` in towers/hf.py).
    held = [half.state_dict() for half in halves] + [dict(half.named_parameters()) for half in halves]
    state = {name: value.detach().cpu() for part in held for name, value in part.items()}
    places = whole.state_dict()
    for name, value in _scalars(model).items():
        if name in places:
            state[name] = value.detach().cpu().reshape(places[name].shape)
    absent, unknown = whole.load_state_dict(state, strict=False)
    assert not unknown, unknown
    if absent:
        log.warning("parts that no tower uses are new: %s", ", ".join(sorted(absent)[:5]))
    return whole


def _scalars(model: DualEncoder) -> dict[str, Tensor]:
    bias = model.logit_bias if model.logit_bias is not None else torch.zeros(1)
    return {"logit_scale": model.logit_scale, "logit_bias": bias, "temperature": (-model.logit_scale).exp()}


def _write_original_inputs(model: DualEncoder, config: Any, folder: Path) -> None:
    """Tokenizer and image processor from where the model came from."""
    from transformers import AutoImageProcessor, AutoTokenizer

    source = config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer is not where it was · {source} · bring it back") from error
    tokenizer.model_max_length = model.tokenizer.context_length
    tokenizer.save_pretrained(folder)
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        processor = _image_processor(model)
    processor.save_pretrained(folder)


def _image_processor(model: DualEncoder) -> Any:
    from transformers import CLIPImageProcessor

    pixels = model.pixels
    resized = pixels.before_crop if pixels.before_crop is not None else pixels.size
    return CLIPImageProcessor(
        size={"height": resized, "width": resized} if pixels.squash else {"shortest_edge": resized},
        crop_size={"height": pixels.size, "width": pixels.size},
        resample=Image.Resampling[pixels.interpolation.upper()],
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
    )


def _opened(folder: Path) -> Peer:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def encode_image(images: Tensor) -> Tensor:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        return _features(theirs.get_image_features(pixel_values=pixels))

    def encode_text(texts: Any) -> Tensor:
        inputs = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return _features(theirs.get_text_features(**inputs))

    return Peer(encode_image, encode_text)


def _features(output: Any) -> Tensor:
    return getattr(output, "pooler_output", output)  # before transformers 5 the features themselves
