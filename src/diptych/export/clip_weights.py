"""open_clip's ViT and text transformer as transformers' CLIPModel: the same sums under other names.

Query, key and value are one matrix there and three here; projections are stored transposed.
"""

import re
from typing import Any

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.dual_encoder import DualEncoder
from diptych.models.towers.clip_names import TOWERS, renamed

_EOT, _SOT = 49407, 49406
"""Ids of CLIP's vocabulary; the end is its highest, so that `argmax` pools there."""


def refuse(model: DualEncoder) -> None:
    """Raises ConfigError, naming the first property of the towers that a CLIPModel cannot have."""
    what = "a decoder that writes captions" if model.text_decoder is not None else None
    what = what or _image_obstacle(model.image_tower) or _text_obstacle(model.text_tower, model.open_clip_config or {})
    if what is not None:
        raise ConfigError(f"transformers' CLIPModel cannot express {what} · model.towers · export to open_clip or onnx")


def _image_obstacle(tower: nn.Module) -> str | None:
    if not isinstance(tower, VisionTransformer):
        trunk = getattr(tower, "trunk", tower)
        return f"an image tower that is no ViT of open_clip ({type(trunk).__name__})"
    (height, width), (patch_height, patch_width) = tower.image_size, tower.patch_size
    return _first(
        {
            "a ViT without layer norm before its layers (no_ln_pre)": isinstance(tower.ln_pre, nn.Identity),
            "attentional pooling of patches (attentional_pool)": tower.attn_pool is not None,
            f"a ViT that is not pooled at its class token (pool_type: {tower.pool_type})": tower.pool_type != "tok",
            "pictures or patches that are not square (image_size, patch_size)": height != width
            or patch_height != patch_width,
        }
    ) or _layers_obstacle(tower.transformer, "image")


def _text_obstacle(tower: nn.Module, config: dict[str, Any]) -> str | None:
    if not isinstance(tower, TextTransformer):
        return f"a text tower that is no transformer of open_clip ({type(tower).__name__})"
    text = config.get("text_cfg", {})
    at_end = tower.pool_type == "argmax" or (tower.pool_type == "eos" and tower.eos_id == _EOT)
    tokenizer = text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs")
    return _first(
        {
            "a class token behind the caption (embed_cls)": tower.cls_emb is not None,
            "texts that see what follows (no_causal_mask)": tower.attn_mask is None,
            f"texts that are not pooled at their end (pool_type: {tower.pool_type})": not at_end,
            "a projection with bias (proj_bias)": isinstance(tower.text_projection, nn.Linear),
            "a tokenizer other than CLIP's (hf_tokenizer_name, tokenizer_kwargs)": bool(tokenizer),
            f"a vocabulary of {tower.vocab_size} (vocab_size)": tower.vocab_size <= _EOT,
        }
    ) or _layers_obstacle(tower.transformer, "text")


def _layers_obstacle(transformer: nn.Module, tower: str) -> str | None:
    blocks = list(transformer.resblocks)  # type: ignore[arg-type]
    return _first(
        {
            f"layers of the {tower} tower that are not CLIP's (block_type: custom)": any(
                type(block) is not ResidualAttentionBlock for block in blocks
            ),
            f"layer scale in the {tower} tower (ls_init_value)": any(
                not isinstance(getattr(block, "ls_1", None), nn.Identity) for block in blocks
            ),
            f"this activation in the {tower} tower (act_kwargs)": not blocks or _activation(blocks[0]) is None,
        }
    )


def _first(obstacles: dict[str, bool]) -> str | None:
    return next((what for what, is_so in obstacles.items() if is_so), None)


def _activation(block: Any) -> str | None:
    match block.mlp.gelu:
        case QuickGELU():
            return "quick_gelu"
        case nn.GELU(approximate="none"):
            return "gelu"
        case nn.GELU(approximate="tanh"):
            return "gelu_pytorch_tanh"
    return None


def config(model: DualEncoder) -> Any:
    """The CLIPConfig of the same architecture; `refuse` must have let it pass."""
    from transformers import CLIPConfig

    image, text = model.image_tower, model.text_tower
    vision_config = _layers(image.transformer, image.ln_post) | {
        "image_size": model.image_size,
        "patch_size": image.patch_size[0],  # type: ignore[index]
        "projection_dim": model.embed_dim,
    }
    text_config = _layers(text.transformer, text.ln_final) | {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": model.tokenizer.context_length,
        "projection_dim": model.embed_dim,
        "bos_token_id": _SOT,
        "eos_token_id": _EOT,
        "pad_token_id": _EOT,
    }
    return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=model.embed_dim)


def _layers(transformer: Any, norm: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": block.mlp.c_fc.in_features,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(block),
        "layer_norm_eps": norm.eps,
    }


def state(model: DualEncoder) -> dict[str, Tensor]:
    """The weights under CLIPModel's names."""
    found: dict[str, Tensor] = {"logit_scale": model.logit_scale.detach().cpu().reshape(())}
    for tower in TOWERS:
        for name, tensor in getattr(model, tower).state_dict().items():
            value = tensor.detach().cpu()
            if name in ("proj", "text_projection"):
                found[f"{'visual' if name == 'proj' else 'text'}_projection.weight"] = value.T.contiguous()
            else:
                found |= _divided(renamed(tower, name), value)
    if "text_projection.weight" not in found:  # proj_type: none
        found["text_projection.weight"] = torch.eye(model.embed_dim)
    return found


def _divided(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A packed matrix or bias as its three parts; anything else as it is."""
    packed = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
    if packed is None:
        return {name: tensor.contiguous()}
    parts = zip("qkv", tensor.chunk(3), strict=True)
    return {f"{packed[1]}.self_attn.{letter}_proj.{packed[2]}": part.contiguous() for letter, part in parts}
