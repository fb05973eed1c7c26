from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from diptych.config import from_tree
from diptych.data.tokens import trim
from diptych.distributed.sharding import blocks
from diptych.encoder import load
from diptych.errors import CheckpointError, ConfigError
from diptych.export.to_open_clip import export
from diptych.models import dual_encoder, speed
from diptych.models.dual_encoder import DualEncoder, Embeddings, ModelConfig
from diptych.models.prompts.splice import vocabulary, word_ids
from diptych.models.speed import SpeedConfig
from diptych.optim import groups
from diptych.testing import TINY_MODEL, run_ranks

CONTEXT, WIDTH, SIDE = 12, 32, 16
WORDS = ["a", "cat", "of", "on", "the", "grass", "red", "fox", "photo", "!"]
TEXTS = ["a red fox", "the cat on the grass", "!", "a photo of a cat on the red grass on the red grass of a fox"]
IMAGES = torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LAYERS = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = LAYERS | {"image_size": SIDE, "patch_size": 8}


def text_keys(**others: Any) -> dict[str, Any]:
    return LAYERS | {"vocab_size": len(WORDS) + 4, "max_position_embeddings": CONTEXT} | others


def clip(eos_token_id: int = 13) -> nn.Module:
    text = text_keys(bos_token_id=12, eos_token_id=eos_token_id, pad_token_id=13)
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    return transformers.CLIPModel(config)


def siglip() -> nn.Module:
    text = text_keys(projection_size=WIDTH, pad_token_id=1, eos_token_id=1, bos_token_id=0)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))


def altclip() -> nn.Module:
    positions = CONTEXT + 2  # RoBERTa counts from behind the padding's id
    text = text_keys(max_position_embeddings=positions, pad_token_id=1, bos_token_id=0, eos_token_id=2, project_dim=24)
    config = transformers.AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=20)
    return transformers.AltCLIPModel(config)


def chinese_clip() -> nn.Module:
    config = transformers.ChineseCLIPConfig(
        text_config=text_keys(pad_token_id=0), vision_config=VISION, projection_dim=24
    )
    return transformers.ChineseCLIPModel(config)


def metaclip_2() -> nn.Module:
    text = text_keys(bos_token_id=0, eos_token_id=2, pad_token_id=1)
    config = transformers.MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=24)
    return transformers.MetaClip2Model(config)


def align() -> nn.Module:
    vision = {
        "image_size": SIDE,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.1,
        "hidden_dim": 24,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 6],
        "depthwise_padding": [],
    }
    config = transformers.AlignConfig(text_config=text_keys(pad_token_id=0), vision_config=vision, projection_dim=8)
    return transformers.AlignModel(config)


def dinov2_and_bert() -> nn.Module:
    image, text = transformers.Dinov2Config(**VISION), transformers.BertConfig(**text_keys(pad_token_id=0))
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(image, text, projection_dim=24)
    return transformers.VisionTextDualEncoderModel(config)


def write_tokenizer(folder: Path, order: list[str], *, pad: str, template: str, masked: bool) -> None:
    """Words at spaces; ids by `order`, in which WORDS stands for the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [word for entry in order for word in (WORDS if entry == "WORDS" else [entry])]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(part, ids[part]) for part in template.split() if part in ids]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token="!",
        padding_side="right",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"] if masked else ["input_ids"],
    ).save_pretrained(folder)


def open_folder(folder: Path, make: Callable[[], nn.Module], **tokenizer: Any) -> nn.Module:
    """A folder as on the hub: weights large enough that each token is felt, tokenizer, image processor; what
    transformers makes of it."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder, **tokenizer)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
    ).save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


CLIP = {"order": ["WORDS", "<x>", "<y>", "<s>", "</s>"], "pad": "</s>", "template": "<s> $A </s>", "masked": True}
SIGLIP = {"order": ["<s>", "</s>", "WORDS", "<x>"], "pad": "</s>", "template": "$A </s>", "masked": False}
ROBERTA = {"order": ["<s>", "<pad>", "</s>", "WORDS"], "pad": "<pad>", "template": "<s> $A </s>", "masked": True}
BERT = {"order": ["[PAD]", "[CLS]", "[SEP]", "WORDS"], "pad": "[PAD]", "template": "[CLS] $A [SEP]", "masked": True}
KINDS = {
    "clip": (clip, CLIP),
    "legacy_clip": (lambda: clip(eos_token_id=2), CLIP),
    "clip_padded_with_a_word": (clip, CLIP | {"pad": "a"}),
    "siglip": (siglip, SIGLIP),
    "masked_siglip": (siglip, SIGLIP | {"masked": True}),
    "altclip": (altclip, ROBERTA),
    "chinese_clip": (chinese_clip, BERT),
    "unmasked_chinese_clip": (chinese_clip, BERT | {"masked": False}),
    "metaclip_2": (metaclip_2, ROBERTA),
    "align": (align, BERT),
    "dinov2_and_bert": (dinov2_and_bert, BERT),
}


def build(folder: Path, seed: int = 0, **keys: Any) -> DualEncoder:
    towers = {"type": "hf", "name": str(folder)} | keys
    return dual_encoder.build(from_tree(ModelConfig, {"towers": towers}), seed=seed)


def features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_transformers_own(tmp_path: Path, kind: str) -> None:
    make, tokenizer = KINDS[kind]
    theirs = open_folder(tmp_path, make, **tokenizer)
    ours = build(tmp_path).eval()
    tokens = ours.tokenizer(TEXTS)
    own = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inputs = own(TEXTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    pixels = (IMAGES / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    exact = {"atol": 1e-6, "rtol": 1e-5}  # other kernels for other lengths and masks: rounding
    with torch.no_grad():
        expected = features(theirs.get_text_features(**inputs))
        torch.testing.assert_close(ours.text_tower(tokens), expected, **exact)
        for row, text in enumerate(expected):
            alone = trim(tokens[row : row + 1])
            torch.testing.assert_close(ours.text_tower(alone)[0], text, **exact)
        torch.testing.assert_close(ours.image_tower(pixels), features(theirs.get_image_features(pixels)), **exact)
    assert trim(tokens[:1]).shape[1] < CONTEXT
    assert (expected[0] - expected[1]).abs().max() > 0.01  # or nothing would have been compared
    assert (ours.embed_dim, ours.image_size, ours.tokenizer.context_length) == (expected.shape[1], SIDE, CONTEXT)
    assert (ours.pixels.mean, ours.pixels.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("kind", ["clip", "siglip", "altclip", "chinese_clip", "dinov2_and_bert"])
def test_every_parameter_learns_and_is_found_by_its_layer(tmp_path: Path, kind: str) -> None:
    make, tokenizer = KINDS[kind]
    open_folder(tmp_path, make, **tokenizer)
    model = build(tmp_path).train()
    found = model(IMAGES, model.tokenizer(TEXTS))
    logits = found.image_features @ found.text_features.T * found.logit_scale
    if found.logit_bias is not None:
        logits = logits + found.logit_bias
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert len(list(blocks(model))) == 4
    rates = {name: group.rate for group in groups.split(model, layer_decay=0.5) for name, _ in group.parameters}
    for tower in ("image_tower", "text_tower"):
        of_tower = {name: rate for name, rate in rates.items() if name.startswith(tower)}
        assert {rate for name, rate in of_tower.items() if ".0." in name} == {0.5}
        assert {rate for name, rate in of_tower.items() if ".1." in name} == {1.0}
        assert {rate for name, rate in of_tower.items() if "embeddings." in name} == {0.25}
    assert rates["logit_scale"] == 1.0


def test_scale_and_bias_are_taken_over_and_nowhere_else(tmp_path: Path) -> None:
    theirs = open_folder(tmp_path, siglip, **SIGLIP)
    ours = build(tmp_path)
    assert ours.logit_scale.tolist() == theirs.logit_scale.tolist()
    assert ours.logit_bias is not None
    assert ours.logit_bias.tolist() == theirs.logit_bias.tolist()
    names = [name for name, _ in ours.named_parameters()]
    assert sorted(name for name in names if "logit" in name) == ["logit_bias", "logit_scale"]
    assert not [name for name in names if name.startswith("image_tower") and "text" in name]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_a_temperature_is_a_scale_too(tmp_path: Path) -> None:
    theirs = open_folder(tmp_path, align, **BERT)
    assert build(tmp_path).logit_scale.exp().item() == pytest.approx(1 / theirs.temperature.item())


def test_random_weights_come_from_the_seed(tmp_path: Path) -> None:
    theirs = open_folder(tmp_path, siglip, **SIGLIP)
    (tmp_path / "model.safetensors").unlink()
    one, same, other = (build(tmp_path, seed, weights="random") for seed in (1, 1, 2))
    weights = [model.state_dict()["image_tower.model.vision_model.head.mlp.fc1.weight"] for model in (one, same, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
    assert not weights[0].equal(theirs.state_dict()["vision_model.head.mlp.fc1.weight"])
    assert one.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert one.logit_bias is None


@pytest.mark.parametrize("kind", ["clip", "siglip", "altclip"])
def test_a_row_of_the_table_is_written_as_its_word(tmp_path: Path, kind: str) -> None:
    make, tokenizer = KINDS[kind]
    open_folder(tmp_path, make, **tokenizer)
    model = build(tmp_path)
    ids = word_ids(model.tokenizer, "red fox") - 1  # they travel one higher
    assert [model.tokenizer.word(int(row)) for row in ids] == ["red", "fox"]
    assert int(ids.max()) < vocabulary(model.text_tower).num_embeddings


def test_half_precision_files_are_trained_in_float32(tmp_path: Path) -> None:
    open_folder(tmp_path, lambda: clip().bfloat16(), **CLIP)
    for weights in ("published", "random"):
        assert {p.dtype for p in build(tmp_path, weights=weights).parameters()} == {torch.float32}


def test_without_an_image_processor_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_folder(tmp_path, clip, **CLIP)
    (tmp_path / "preprocessor_config.json").unlink()
    model = build(tmp_path)
    assert model.image_size == SIDE
    assert model.pixels.mean[0] == pytest.approx(0.48145466)
    assert "no image processor" in caplog.text


def test_shorter_captions_when_asked(tmp_path: Path) -> None:
    open_folder(tmp_path, clip, **CLIP)
    model = build(tmp_path, context_length=5)
    tokens = model.tokenizer(TEXTS)
    assert tokens.shape == (4, 5)
    assert tokens[3].tolist() == [13, 1, 9, 3, 14]  # begin, "a", "photo", "of", end: each id one higher


def damage_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "keys", "error", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), {}, ConfigError, "cannot open"),
        (lambda folder: (folder / "tokenizer.json").unlink(), {}, ConfigError, "cannot open"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), {}, CheckpointError, "do not fit"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            {},
            CheckpointError,
            "fit",
        ),
        (damage_weights, {}, CheckpointError, "1 weights are absent, visual_projection.weight"),
        (lambda folder: None, {"context_length": CONTEXT + 1}, ConfigError, "at most 12"),
        (lambda folder: None, {"context_length": 0}, ConfigError, "at most 12"),
        (
            lambda folder: transformers.BertModel(transformers.BertConfig(**text_keys())).save_pretrained(folder),
            {},
            ConfigError,
            "BertModel is no dual encoder",
        ),
        (
            lambda folder: transformers.CLIPImageProcessor(crop_size={"height": 8, "width": 8}).save_pretrained(folder),
            {},
            ConfigError,
            "does not embed a picture",
        ),
        (lambda folder: write_tokenizer(folder, **CLIP | {"pad": None}), {}, ConfigError, "does not pad"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], Any], keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    open_folder(tmp_path, clip, **CLIP)
    spoil(tmp_path)
    with pytest.raises(error, match=message) as caught:
        build(tmp_path, **keys)
    assert "\n" not in str(caught.value)


def test_siglip_2_of_any_size_is_refused(tmp_path: Path) -> None:
    def naflex() -> nn.Module:
        vision = LAYERS | {"patch_size": 8, "num_patches": 4}
        text = text_keys(projection_size=WIDTH, pad_token_id=1, eos_token_id=1, bos_token_id=0)
        return transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))

    open_folder(tmp_path, naflex, **SIGLIP)
    with pytest.raises(ConfigError, match="does not embed a picture"):
        build(tmp_path)


def test_no_export_to_open_clip(tmp_path: Path) -> None:
    open_folder(tmp_path / "hub", clip, **CLIP)
    with pytest.raises(ConfigError, match="open_clip cannot build these towers"):
        export(build(tmp_path / "hub"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_beside_an_image_tower_of_open_clip(tmp_path: Path) -> None:
    open_folder(tmp_path, siglip, **SIGLIP)
    image, text = TINY_MODEL["towers"], {"type": "hf", "name": str(tmp_path)}
    tree = {"towers": {"type": "pair", "image": image, "text": text, "embed_dim": WIDTH}}
    tree |= {"frozen": ["image_tower.tower"]}
    model = dual_encoder.build(from_tree(ModelConfig, tree), seed=0)
    whole = build(tmp_path)
    tokens = model.tokenizer(TEXTS)
    assert tokens.equal(whole.tokenizer(TEXTS))
    with torch.no_grad():
        assert model.eval().encode_text(tokens).equal(whole.eval().encode_text(tokens))  # as wide: no projection
    assert model.pixels.mean != whole.pixels.mean
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.logit_bias is None
    loss_of(model.train()(IMAGES, tokens)).backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in model.named_parameters() if not name.startswith("image_tower.tower.")}
    assert "image_tower.projection.weight" in learned


def loss_of(found: Embeddings) -> Tensor:
    """Something that every parameter takes part in."""
    bias = found.logit_bias if found.logit_bias is not None else 0.0
    return (found.image_features * found.text_features).sum(1).mean() * found.logit_scale + bias


def divided_gradients(rank: int, folder: Path, way: str) -> list[Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    from diptych.distributed import sharding

    model = build(folder).eval()
    if way == "fsdp2":
        sharding.shard(model, device_type="cpu", world_size=2, low_precision=False)
    wrapped = DistributedDataParallel(model) if way == "ddp" else model
    rows = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):  # DDP speaks of parameters without gradients in the second step
        model.zero_grad()
        found = wrapped(IMAGES[rows], model.tokenizer(TEXTS)[rows])
        loss_of(found).backward()
    return [sharding.whole(p.grad) for p in model.parameters() if p.grad is not None and p.grad.numel() > 1]


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_ranks_make_the_gradients_of_one(tmp_path: Path, way: str) -> None:
    open_folder(tmp_path, siglip, **SIGLIP)
    model = build(tmp_path).eval()
    found = model(IMAGES, model.tokenizer(TEXTS))
    loss_of(found).backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel() > 1]
    for gradients in run_ranks(divided_gradients, 2, tmp_path, way):
        torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)  # another order of the same sums


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese_clip"])
def test_activations_computed_again_change_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, tokenizer = KINDS[kind]
    open_folder(tmp_path, make, **tokenizer)
    calls: list[object] = []
    name = "_checkpoint_without_reentrant_generator"
    whole = getattr(torch.utils.checkpoint, name)
    monkeypatch.setattr(torch.utils.checkpoint, name, lambda *a, **k: (calls.append(a), whole(*a, **k))[1])

    def gradients(config: SpeedConfig) -> list[Tensor]:
        model = build(tmp_path).train()
        speed.prepare(model, config)
        torch.manual_seed(0)  # some have dropout, which is to drop the same again
        found = model(IMAGES, model.tokenizer(TEXTS))
        (found.image_features * found.text_features).sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain, again = gradients(SpeedConfig()), gradients(SpeedConfig(checkpoint_activations=True))
    assert len(calls) == 4  # layers of both towers
    torch.testing.assert_close(again, plain)


def test_pictures_are_shown_as_the_image_processor_says(tmp_path: Path) -> None:
    open_folder(tmp_path, siglip, **SIGLIP)
    transformers.SiglipImageProcessor(
        size={"height": SIDE, "width": SIDE}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(tmp_path)
    encoder = load(f"hf:{tmp_path}")
    assert (encoder.view.squash, encoder.view.interpolation) == (True, "bilinear")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray(IMAGES[0].repeat(1, 2, 5).permute(1, 2, 0).numpy())
    expected = theirs(images=[picture], return_tensors="pt")["pixel_values"][0]
    assert (encoder.view(picture) / 127.5 - 1 - expected).abs().max() < 0.02  # torchvision's and Pillow's resizing


def test_a_view_that_is_cut_out_of_a_larger_one(tmp_path: Path) -> None:
    open_folder(tmp_path, clip, **CLIP)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 20}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(tmp_path)
    assert build(tmp_path).pixels.before_crop == 20
    assert build(tmp_path).image_size == SIDE
