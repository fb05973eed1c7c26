import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from diptych.config import from_tree
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_MODEL

WORDS = ["a", "cat", "of", "on", "the", "grass", "red", "fox", "photo", "!"]


def loud(model: nn.Module) -> None:
    """Weights so large that each token and patch is felt."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        elif parameter.numel() > 1:
            nn.init.uniform_(parameter, 0.5, 1.5)


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DualEncoder]:
    """A tiny model of open_clip with other keys."""

    def build(
        vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, bias: float | None = None, **keys: Any
    ) -> DualEncoder:
        tiny = TINY_MODEL["towers"]
        towers = {"vision_cfg": tiny["vision"] | (vision or {}), "text_cfg": tiny["text"] | (text or {})}
        file = tmp_path_factory.mktemp("model") / "tiny.json"
        file.write_text(json.dumps({"embed_dim": 16} | towers | keys))
        towers = {"type": "open_clip", "name": str(file)}
        model = dual_encoder.build(from_tree(ModelConfig, {"towers": towers, "logit_bias": bias}), seed=0)
        loud(model)
        return model.eval()

    return build


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    """A folder with a tiny SigLIP as transformers writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = layers | ids | {"vocab_size": 12, "max_position_embeddings": 12, "projection_size": 32}
    vision = layers | {"image_size": 16, "patch_size": 8}
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    loud(model)
    nn.init.constant_(model.logit_bias, -7.5)
    model.save_pretrained(tmp_path / "siglip")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", *WORDS])}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="</s>",
        unk_token="!",
        padding_side="right",
        model_max_length=12,
        model_input_names=["input_ids"],
    ).save_pretrained(tmp_path / "siglip")
    transformers.SiglipImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    ).save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip"
