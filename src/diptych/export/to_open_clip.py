"""A folder that open_clip opens with `create_model_from_pretrained("local-dir:FOLDER")`.

FOLDER/
  open_clip_config.json       model_cfg and preprocess_cfg
  open_clip_model.safetensors weights under open_clip's names
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from diptych.errors import ConfigError, DataError
from diptych.models.dual_encoder import DualEncoder

_NAMES = {"image_tower.": "visual.", "text_tower.": "text."}


def export(model: DualEncoder, folder: Path, *, overwrite: bool = False) -> Path:
    """Writes the model; returns the folder.

    Raises:
        ConfigError: open_clip does not know these towers.
        DataError: the folder is not empty and `overwrite` is off.
    """
    if model.open_clip_config is None:
        raise ConfigError(
            "open_clip cannot build these towers · model.towers · only those of `type: open_clip` go there"
        )
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise DataError(f"output folder is not empty · {folder} · choose another, or add --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = model.open_clip_config | {"custom_text": True}
    if model.logit_bias is not None:
        model_cfg["init_logit_bias"] = 0.0
    preprocess_cfg = {
        "mean": list(model.image_mean),
        "std": list(model.image_std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_renamed(model.state_dict()), folder / "open_clip_model.safetensors")
    return folder


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in _NAMES.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        renamed[name] = tensor.detach().cpu().contiguous()
    for name in ("logit_scale", "logit_bias"):  # vectors of one here, without axes there
        if name in renamed:
            renamed[name] = renamed[name].squeeze(0)
    return renamed
