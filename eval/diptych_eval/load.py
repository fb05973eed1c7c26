"""Any checkpoint as one object with `encode_image` and `encode_text`.

`load("runs/my_run")` takes a run folder (its averaged weights where it kept them), `load("open_clip:ViT-B-32:openai")`
an open_clip model, `load("open_clip:folder")` a folder in open_clip's form.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diptych.config import from_tree, read_yaml
from diptych.data.tokens import trim
from diptych.errors import CheckpointError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.runfolder import RunFolder
from diptych.train import checkpoint

_TEXT_BATCH = 512


class ModelEncoder:
    """A dual encoder ready to measure: evaluation mode, no gradients, float32 features on the CPU."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model.eval()
        self.image_size = model.image_size
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.fingerprint = _fingerprint(model)
        self._device = model.logit_scale.device

    @torch.inference_mode()
    def encode_image(self, images: UInt8[Tensor, "B 3 height width"]) -> Float[Tensor, "B D"]:
        """Unit-norm features of uint8 pictures."""
        return self.model.encode_image(images.to(self._device)).cpu()

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Unit-norm features of captions; batches hold captions of similar length, so that little is padding."""
        if not texts:
            return torch.empty(0, self.model.embed_dim)
        tokens = self.model.tokenizer(list(texts))
        order = torch.argsort((tokens != 0).sum(1))
        parts = [self.model.encode_text(trim(rows).to(self._device)).cpu() for rows in tokens[order].split(_TEXT_BATCH)]
        features = torch.cat(parts)
        return torch.empty_like(features).index_copy_(0, order, features)


def _fingerprint(model: DualEncoder) -> str:
    """A hash of all weights and of the architecture."""
    digest = hashlib.sha256(json.dumps(model.open_clip_config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load(name: str) -> ModelEncoder:
    """The model that `name` means.

    Raises:
        CheckpointError: it is neither a run folder with a checkpoint nor an `open_clip:` name.
    """
    if name.startswith("open_clip:"):
        return ModelEncoder(_load_open_clip(name.removeprefix("open_clip:")))
    run = RunFolder(Path(name))
    if not run.exists:
        raise CheckpointError(f"neither a run folder nor open_clip:NAME[:TAG] · {name} · check the path")
    return ModelEncoder(load_run(run))


def load_run(run: RunFolder) -> DualEncoder:
    """The model of a run with the weights of its newest intact checkpoint."""
    config = from_tree(ModelConfig, read_yaml(run.config)["model"], where=str(run.config))
    model = dual_encoder.build(config, seed=0)
    try:
        model.load_state_dict(checkpoint.load_weights(run.checkpoints))
    except RuntimeError as error:
        raise CheckpointError(
            f"weights do not fit config.yaml ({' '.join(str(error).split())[:200]}) · {run.root}"
        ) from None
    return model


def _load_open_clip(name: str) -> DualEncoder:
    """`NAME`, `NAME:TAG`, or a folder with open_clip_config.json and open_clip_model.safetensors."""
    from diptych.models.towers.open_clip import OpenClipTowers

    architecture, _, tag = name.partition(":")
    return dual_encoder.build(ModelConfig(towers=OpenClipTowers(architecture, weights=tag or None)), seed=0)
