"""A folder with what LoRA learned, for peft on the transformers model of the same weights, or for `diptych.load`: see
models/peft_folder.py."""

from pathlib import Path

from diptych.encoder import load
from diptych.export import card
from diptych.export.check import Difference, Peer, compare
from diptych.export.folder import building
from diptych.models import peft_folder
from diptych.models.dual_encoder import DualEncoder

_USAGE = """
import diptych

model = diptych.load("FOLDER")  # the base that the folder names, with what was learned in its weights
features = model.encode_text(["a red fox", "a blue whale"])
"""


def export(
    model: DualEncoder, folder: Path, *, origin: card.Origin = card.UNKNOWN, overwrite: bool = False
) -> Difference:
    """Writes what was learned; returns how far the features of base and adapter, opened again, are from the model's.

    Raises:
        ConfigError: more was learned than LoRA, or the base has no name.
        CheckpointError: the base cannot be opened, or has other weights by now.
        DataError: the folder is not empty and `overwrite` is off.
    """
    with building(folder, overwrite=overwrite) as unfinished:
        peft_folder.write(model, unfinished)
        card.write(unfinished, model, card.Library("peft", "peft", _USAGE), origin)
        opened = load(str(unfinished), device="cpu")
        return compare(model, Peer(opened.encode_image, opened.encode_text))
