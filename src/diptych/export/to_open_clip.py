"""A folder that open_clip opens with `create_model_from_pretrained("local-dir:FOLDER")`.

FOLDER/
  open_clip_config.json       model_cfg and preprocess_cfg
  open_clip_model.safetensors weights under open_clip's names
  README.md                   the model card
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diptych.errors import CheckpointError, ConfigError
from diptych.export import card
from diptych.export.check import CAPTIONS, TOLERANCE, Difference, Peer, as_used, compare
from diptych.export.folder import building
from diptych.models.dual_encoder import DualEncoder

log = logging.getLogger(__name__)
_NAMES = {"image_tower.": "visual.", "text_tower.": "text."}
LIBRARY = card.Library(
    "open_clip",
    "open_clip",
    """
import open_clip
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
image = model.encode_image(preprocess(Image.open("picture.jpg"))[None], normalize=True)
texts = model.encode_text(tokenizer(["a red fox", "a blue whale"]), normalize=True)
print((image @ texts.T * model.logit_scale.exp()).softmax(-1))
""",
)


def export(
    model: DualEncoder, folder: Path, *, origin: card.Origin = card.UNKNOWN, overwrite: bool = False
) -> Difference:
    """Writes the model; returns how far the features are from its own when open_clip opens the folder again.

    Raises:
        ConfigError: open_clip does not know these towers.
        DataError: the folder is not empty and `overwrite` is off.
        CheckpointError: what open_clip opens gives other features, or a captioner other captions.
    """
    if model.open_clip_config is None:
        raise ConfigError(
            "open_clip cannot build these towers · model.towers · only those of `type: open_clip` go there"
        )
    if model.match_head is not None:
        log.warning("the matching head is left out: open_clip has no place for it")
    with building(folder, overwrite=overwrite) as unfinished:
        config = json.dumps(_config(model, model.open_clip_config), indent=2)
        (unfinished / "open_clip_config.json").write_text(config + "\n", encoding="utf-8")
        save_file(_renamed(model.state_dict()), unfinished / "open_clip_model.safetensors")
        card.write(unfinished, model, LIBRARY, origin)
        theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{unfinished}", precision="fp32")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{unfinished}")
        if model.text_decoder is not None:
            _compare_captions(model, theirs)
        return compare(model, _peer(theirs, preprocess, tokenizer))


def _config(model: DualEncoder, towers: dict[str, Any]) -> dict[str, Any]:
    model_cfg = copy.deepcopy(towers) | {"custom_text": True}
    # The weights lie beside it: whoever opens this need not fetch those that the towers began with.
    if "timm_model_name" in model_cfg["vision_cfg"]:
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in model_cfg["text_cfg"]:
        model_cfg["text_cfg"]["hf_model_pretrained"] = False
    if model.logit_bias is not None:
        model_cfg["init_logit_bias"] = 0.0
    preprocess_cfg = {
        "mean": list(model.pixels.mean),
        "std": list(model.pixels.std),
        "interpolation": model.pixels.interpolation,
        "resize_mode": "squash" if model.pixels.squash else "shortest",
    }
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("match_head."):
            continue
        for ours, theirs in _NAMES.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        renamed[name] = tensor.detach().cpu().contiguous()
    for name in ("logit_scale", "logit_bias"):  # vectors of one here, without axes there
        if name in renamed:
            renamed[name] = renamed[name].squeeze(0)
    return renamed


@torch.no_grad()
def _compare_captions(model: DualEncoder, theirs: Any) -> None:
    """Raises CheckpointError where the probabilities of the next words differ by more than rounding."""
    size = model.image_size
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenizer(CAPTIONS[:1]).to(model.logit_scale.device)
    images = images.to(tokens.device)
    with as_used(model):
        ours = model.next_word_logits(images, tokens)
        pixels = model.normalised(images)
    found = theirs.eval()(pixels.cpu(), tokens.cpu())["logits"]
    difference = float((ours.cpu().softmax(-1) - found.softmax(-1)).abs().max())
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the export foretells other words, off by {difference:.1e} · limit {TOLERANCE:.0e} · nothing is written"
        )


def _peer(theirs: Any, preprocess: Any, tokenizer: Any) -> Peer:
    def encode_image(images: Tensor) -> Tensor:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return theirs.encode_image(torch.stack([preprocess(picture) for picture in pictures]))

    return Peer(encode_image, lambda texts: theirs.encode_text(tokenizer(list(texts))))
