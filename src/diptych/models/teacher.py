"""Another dual encoder, frozen, whose features a model learns from."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

from diptych.errors import CheckpointError, ConfigError
from diptych.models.dual_encoder import DualEncoder, Embeddings, ModelConfig


@dataclass(frozen=True)
class Teacher:
    """A dual encoder with weights of its own, its own picture size and its own tokenizer."""

    model: DualEncoder
    """In evaluation mode, without gradients; its parameters may be divided among ranks."""
    logit_scale: float
    """Multiplies its cosines: already exponentiated, and exact however parameters are divided and rounded."""

    @torch.no_grad()
    def embed(self, images: UInt8[Tensor, "B 3 height width"], tokens: Int[Tensor, "B L"]) -> Embeddings:
        """Features of pictures of any size, and of ids of its own tokenizer."""
        found: Embeddings = self.model(resized(images, self.model.image_size), tokens)
        return found


def build_teacher(config: ModelConfig) -> Teacher:
    """The teacher that a configuration names; torch's global generator is left as it was.

    Raises:
        ConfigError: it brings no weights, or what else its towers refuse.
        CheckpointError: its weights cannot be used.
    """
    if config.frozen:
        raise ConfigError("a teacher is frozen as a whole · teacher.frozen · leave it out")
    with torch.random.fork_rng(devices=[]):
        try:
            built = config.towers.build()
        except (ConfigError, CheckpointError) as error:
            raise type(error)(f"the teacher cannot be built: {error}") from error
    if built.logit_scale is None:
        raise ConfigError(
            "the teacher brings no logit scale: its weights are random, or its towers were not trained together · "
            "teacher.towers · name weights (`weights`), or a folder that `diptych export` wrote"
        )
    model = DualEncoder(built, config).eval()
    scale = model.logit_scale.exp().item()
    return Teacher(model.requires_grad_(requires_grad=False), scale)


def resized(images: UInt8[Tensor, "B 3 height width"], size: int) -> UInt8[Tensor, "B 3 size size"]:
    """Square pictures at another size, bicubic and antialiased, as they are where they have it."""
    if images.shape[-2:] == (size, size):
        return images
    with torch.autocast(images.device.type, enabled=False):
        pixels = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)
