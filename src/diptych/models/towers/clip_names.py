"""What open_clip's ViT and text transformer call their parts, and transformers' CLIPModel the same parts."""

import re

_RENAMED: dict[str, dict[str, str]] = {
    "image_tower": {
        "class_embedding": "vision_model.embeddings.class_embedding",
        "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "ln_pre": "vision_model.pre_layrnorm",
        "ln_post": "vision_model.post_layernorm",
        "transformer.resblocks": "vision_model.encoder.layers",
    },
    "text_tower": {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
        "transformer.resblocks": "text_model.encoder.layers",
    },
}
_IN_A_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

TOWERS = tuple(_RENAMED)
"""Names of the halves of a dual encoder."""


def renamed(tower: str, name: str) -> str:
    """CLIPModel's name for a part or weight of a tower; packed attention keeps its own."""
    for ours, theirs in _RENAMED[tower].items():
        if name == ours or name.startswith(f"{ours}."):
            name = theirs + name.removeprefix(ours)
            break
    for ours, theirs in _IN_A_BLOCK.items():
        name = re.sub(rf"(\.layers\.\d+)\.{re.escape(ours)}(?=\.|$)", rf"\1.{theirs}", name)
    return name
