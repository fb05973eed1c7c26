"""From pictures to captions."""

from typing import assert_never

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from diptych.errors import ConfigError
from diptych.generate import methods
from diptych.generate.beam import beam
from diptych.generate.cache import CaptionWriter
from diptych.generate.prefix import PrefixWriter
from diptych.generate.rules import Rules
from diptych.generate.settings import GenerateConfig
from diptych.models.dual_encoder import DualEncoder
from diptych.models.towers.prefix import PrefixDecoder
from diptych.seeding import derive


@torch.inference_mode()
def write(
    model: DualEncoder, images: UInt8[Tensor, "B 3 height width"], config: GenerateConfig, *, first: int = 0
) -> Int[Tensor, "B T"]:
    """Ids of captions, without the start; behind a caption's end stands its end. Call a model in evaluation mode.

    Args:
        first: number of the first picture, where these are some of many: what is drawn depends on it.

    Raises:
        ConfigError: the model writes no captions.
    """
    _, image_tokens = model.see(images)
    if image_tokens is None or model.spelling is None:
        raise ConfigError(
            "the model writes no captions · generate · use a captioner, such as coca_ViT-B-32 or a language model with "
            "prefix_tokens"
        )
    kind = PrefixWriter if isinstance(model.text_decoder, PrefixDecoder) else CaptionWriter
    writer = kind(model, image_tokens, early_layer=config.layer_contrast)
    room, device = min(config.max_length, model.spelling.room), image_tokens.device
    rules = Rules(model.spelling.end, min(config.min_length, room), room, model.spelling.banned)
    match config.method:
        case "greedy":
            return methods.greedy(writer, rules, device)
        case "beam":
            return beam(writer, rules, device, beams=config.beams, length_penalty=config.length_penalty)
        case "sample":
            draws = _draws(config.seed, first, len(images), room).to(device)
            return methods.sample(writer, rules, draws, filters=(config.temperature, config.top_k, config.top_p))
        case "contrastive":
            return methods.contrastive(writer, rules, device, candidates=config.candidates, penalty=config.penalty)
        case _:
            assert_never(config.method)


def captions(
    model: DualEncoder, images: UInt8[Tensor, "B 3 height width"], config: GenerateConfig, *, first: int = 0
) -> list[str]:
    """Captions of pictures, see `write`."""
    ids = write(model, images, config, first=first).tolist()
    assert model.spelling is not None, "`write` has seen to it"
    end = model.spelling.end
    return [model.spelling.text(row[: row.index(end)] if end in row else row) for row in ids]


def _draws(seed: int, first: int, count: int, length: int) -> Tensor:
    """Of each picture alone: no batch, device or neighbour changes them."""
    keys = (derive(seed, "caption", number) for number in range(first, first + count))
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(key)) for key in keys])
