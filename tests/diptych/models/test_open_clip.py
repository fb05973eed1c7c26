"""Towers that open_clip builds of other libraries' parts, and texts whose padding counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from diptych.config import from_tree
from diptych.data.tokens import trim
from diptych.errors import CheckpointError, ConfigError
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.testing import TINY_MODEL

TOWERS: dict[str, Any] = TINY_MODEL["towers"]
TEXTS = ["a red fox", "the cat on the grass", "a fox", "a photo of a cat on the red grass on the red grass of a fox"]
EXACT = {"atol": 1e-6, "rtol": 1e-5}  # other kernels for other lengths: rounding


def build(**keys: Any) -> DualEncoder:
    return dual_encoder.build(from_tree(ModelConfig, {"towers": TOWERS | keys}), seed=0)


@pytest.mark.parametrize(
    "text",
    [
        {"no_causal_mask": True, "pool_type": "last"},  # SigLIP
        {"no_causal_mask": True},
        {"pool_type": "last"},
        {"embed_cls": True},  # CoCa
    ],
)
def test_padding_is_put_back_where_it_counts(text: dict[str, Any]) -> None:
    model = build(text=TOWERS["text"] | text).eval()
    tokens = model.tokenizer(["a fox"])
    assert trim(tokens).shape[1] < tokens.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(model.text_tower(trim(tokens)), model.text_tower(tokens), **EXACT)


# --- image towers of timm -----------------------------------------------------------------------------------------


def timm_towers(name: str = "test_vit", **vision: Any) -> dict[str, Any]:
    return {"vision": {"timm_model_name": name, "timm_pool": "", "image_size": 160} | vision}


@pytest.mark.parametrize(
    ("name", "size", "vision"),
    [
        ("vit_tiny_patch16_224", 224, {}),
        ("test_vit", 160, {"timm_proj": "", "timm_pool": "token"}),  # timm's classifier is the projection
        ("test_vit", 160, {"timm_proj": "mlp"}),
        ("test_resnet", 160, {"timm_pool": "avg"}),
    ],
)
def test_any_backbone_of_timm_learns_whole(name: str, size: int, vision: dict[str, Any]) -> None:
    model = build(**timm_towers(name, image_size=size, timm_model_pretrained=False, **vision)).train()
    assert model.image_size == size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = model(images, model.tokenizer(TEXTS[:2]))
    loss = torch.nn.functional.cross_entropy(
        found.image_features @ found.text_features.T * found.logit_scale, torch.arange(2)
    )
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def safetensors_file(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def training_file(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "a.pth")
    return folder / "a.pth"


@pytest.mark.parametrize("write", [safetensors_file, training_file])
@pytest.mark.parametrize("vision", [{}, {"timm_proj": "", "timm_pool": "token"}])
def test_image_weights_from_a_local_file(
    tmp_path: Path, write: Callable[[Path, dict[str, Tensor]], Path], vision: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    theirs = timm.create_model("test_vit", num_classes=10).eval()
    path = write(tmp_path, theirs.state_dict())
    ours = build(**timm_towers(**vision), image_weights=str(path)).eval()
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        trunk = ours.image_tower.trunk
        found = trunk.forward_head(trunk.forward_features(images), pre_logits=True)
        torch.testing.assert_close(found, expected, **EXACT)
        assert ours.image_tower(images).shape == (2, 16)
    assert ours.pixels.mean == pytest.approx(theirs.pretrained_cfg["mean"])
    assert ours.pixels.mean != build(**timm_towers()).pixels.mean
    assert ours.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_a_folder_in_timms_form(tmp_path: Path) -> None:
    theirs = timm.create_model("test_vit")
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours = build(**timm_towers(f"local-dir:{tmp_path}", timm_model_pretrained=True))
    weights = ours.image_tower.trunk.state_dict()
    assert all(weights[name].equal(value) for name, value in theirs.state_dict().items() if name in weights)


@pytest.mark.parametrize(
    ("spoil", "keys", "error", "message"),
    [
        (lambda state: {}, {}, CheckpointError, "Missing key"),
        (lambda state: state | {"colour": torch.zeros(1)}, {}, CheckpointError, "colour"),
        (lambda state: state | {"pos_embed": torch.zeros(1, 5, 64)}, {}, CheckpointError, "size mismatch"),
        (lambda state: state, {"vision": TOWERS["vision"]}, ConfigError, "those of a timm model"),
        (lambda state: state, {"image_weights": "nowhere.pth"}, CheckpointError, "nowhere.pth"),
    ],
)
def test_image_weights_that_do_not_fit(
    tmp_path: Path, spoil: Callable[..., Any], keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = safetensors_file(tmp_path, spoil(timm.create_model("test_vit").state_dict()))
    with pytest.raises(error, match=message) as caught:
        build(**timm_towers() | {"image_weights": str(path)} | keys)
    assert "\n" not in str(caught.value)


# --- text towers of transformers ----------------------------------------------------------------------------------

KEYS = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**KEYS)), ["[PAD]", "[CLS]", "[SEP]"]),
    "roberta": (
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**KEYS, max_position_embeddings=20)),
        ["<s>", "<pad>", "</s>"],
    ),
}


def text_folder(folder: Path, kind: str) -> Path:
    """As on the hub: half precision weights large enough that each token is felt, and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    make, special = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.bfloat16().save_pretrained(folder)
    words = [*special, *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first, pad = (special[1], special[0]) if kind == "bert" else (special[0], special[1])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {special[2]}", special_tokens=[(first, words.index(first)), (special[2], 2)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"])
def test_text_towers_of_transformers(tmp_path: Path, kind: str, pooler: str) -> None:
    folder = text_folder(tmp_path, kind)
    text = {"hf_model_name": str(folder), "hf_pooler_type": pooler, "hf_proj_type": "linear", "context_length": 12}
    model = build(text=text).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        output, mask = theirs(inputs.input_ids, inputs.attention_mask), inputs.attention_mask.unsqueeze(-1)
        pooled = {
            "mean_pooler": (output.last_hidden_state * mask).sum(1) / mask.sum(1),
            "cls_pooler": output.pooler_output,
            "cls_last_hidden_state_pooler": output.last_hidden_state[:, 0],
        }[pooler]
        expected = model.text_tower.proj(pooled)
        tokens = model.tokenizer(TEXTS)
        torch.testing.assert_close(model.text_tower(tokens), expected, **EXACT)
        for row in range(len(TEXTS)):
            alone = trim(tokens[row : row + 1])
            assert alone.shape[1] == inputs.attention_mask[row].sum()
            torch.testing.assert_close(model.text_tower(alone)[0], expected[row], **EXACT)

    found = model.train()(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), tokens)
    (found.image_features @ found.text_features.T * found.logit_scale).log_softmax(-1).diagonal().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("spoil", ["config.json", "tokenizer.json"])
def test_texts_that_transformers_cannot_open(tmp_path: Path, spoil: str) -> None:
    (text_folder(tmp_path, "bert") / spoil).unlink()
    with pytest.raises(ConfigError, match="cannot") as caught:
        build(text={"hf_model_name": str(tmp_path), "hf_proj_type": "linear", "context_length": 12})
    assert "\n" not in str(caught.value)
