"""A base in eight bits, or in four: nearly the same features, a quarter of the memory, exact in itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.diptych.models import language_models

import diptych.testing as make
from diptych.config import from_tree
from diptych.distributed import sharding
from diptych.encoder import load
from diptych.errors import CheckpointError, ConfigError
from diptych.export.to_open_clip import export
from diptych.generate import GenerateConfig, captions
from diptych.log import read_metrics
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.merge import merged
from diptych.testing import TINY_MODEL
from diptych.train import loop

pytest.importorskip("torchao", reason="needs the extra `compress`")

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LORA = {"type": "lora", "rank": 2}
COMPRESS = {"type": "compress"}
NF4 = {"type": "compress", "bits": 4}
BITS = pytest.mark.parametrize("compress", [COMPRESS, NF4], ids=["int8", "nf4"])


def build(*adapters: dict[str, object], seed: int = 0) -> DualEncoder:
    return dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"adapters": list(adapters)}), seed=seed).eval()


@torch.no_grad()
def features(model: DualEncoder) -> torch.Tensor:
    return torch.cat([model.encode_image(IMAGES), model.encode_text(model.tokenizer(["a red fox", "cat"]))])


@pytest.mark.parametrize(
    ("compress", "least", "bytes_each"), [(COMPRESS, 0.999, 1.25), (NF4, 0.98, 0.7)], ids=["int8", "nf4"]
)
def test_features_hardly_change(compress: dict[str, Any], least: float, bytes_each: float) -> None:
    plain, small = build(), build(compress, LORA)
    assert least < features(small).mul(features(plain)).sum(1).min() < 0.999999
    layer = small.text_tower.transformer.resblocks[0].mlp.c_fc.base_layer
    assert sharding.is_compressed(layer.weight)
    tensors = [getattr(layer.weight, name) for name in layer.weight.__tensor_flatten__()[0]]
    assert sum(part.nbytes for part in tensors) < bytes_each * layer.weight.numel()
    with pytest.raises(ConfigError, match="compressed weights take nothing in"):
        merged(small)


def test_four_bits_are_the_nearest_of_sixteen_numbers() -> None:
    weight = build().text_tower.transformer.resblocks[0].mlp.c_fc.weight.detach().double()
    found = build(NF4, LORA).text_tower.transformer.resblocks[0].mlp.c_fc.base_layer.weight
    scales = weight.view(-1, 64).abs().amax(1, keepdim=True)
    numbers = found.nf4.double()
    assert numbers.tolist() == sorted({-1.0, 0.0, 1.0, *numbers.tolist()})
    nearest = numbers[(weight.view(-1, 64, 1) / scales[..., None] - numbers).abs().argmin(2)] * scales
    # The scales themselves have eight bits: a 256th of what lies between them.
    torch.testing.assert_close(sharding.whole(found).double().view(-1, 64), nearest, atol=0, rtol=0.02)


def test_gradients_go_through_four_bits_as_through_the_same_numbers() -> None:
    small, plain = build(NF4, LORA), build(LORA)
    values = {name: sharding.whole(value) for name, value in small.state_dict().items()}
    plain.load_state_dict(values)
    found = []
    for model in (small, plain):
        model.encode_text(model.tokenizer(["a red fox", "cat"]))[:, 0].sum().backward()
        found.append({name: p.grad for name, p in model.text_tower.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all("lora_" in name for name in found[0])
    assert sum(float(grad.abs().sum()) for grad in found[0].values()) > 0
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_what_does_not_fit_into_four_bits_is_one_line() -> None:
    odd = TINY_MODEL["towers"] | {"text": TINY_MODEL["towers"]["text"] | {"width": 6, "heads": 1, "mlp_ratio": 1.5}}
    tree = {"towers": odd, "adapters": [NF4 | {"tower": "text"}, LORA]}
    with pytest.raises(ConfigError, match=r"text_tower\..* \[6, 6\] does not fit into four bits") as caught:
        dual_encoder.build(from_tree(ModelConfig, tree), seed=0)
    assert "\n" not in str(caught.value)


@BITS
def test_a_run_on_a_compressed_base_resumes_exactly_and_opens(
    compress: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    keys = {"total_samples": 48, "ema_decay": 0.9, "model": TINY_MODEL | {"adapters": [compress, LORA]}}
    whole = loop.train(make.tiny_recipe(shards, tmp_path / "whole", **keys))
    parts = make.tiny_recipe(shards, tmp_path / "parts", **keys)
    loop.train(parts)
    make.forget_after(tmp_path / "parts", 3)
    loop.train(parts)
    first, second = (load(str(tmp_path / name)) for name in ("whole", "parts"))
    assert features(first.model).equal(features(second.model))
    assert not features(first.model).equal(features(build(compress, LORA)))
    towers = {"type": "run", "run": str(whole.root)}
    plain = dual_encoder.build(from_tree(ModelConfig, {"towers": towers}), seed=0).eval()
    torch.testing.assert_close(features(plain), features(first.model), atol=1e-5, rtol=0)


@BITS
def test_another_base_is_not_resumed_on(compress: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    export(build(), tmp_path / "base")
    model = {"towers": {"type": "open_clip", "name": str(tmp_path / "base")}, "adapters": [compress, LORA]}
    recipe = make.tiny_recipe(shards, tmp_path / "run", model=model)
    loop.train(recipe)
    make.forget_after(tmp_path / "run", 3)
    export(build(seed=1), tmp_path / "base", overwrite=True)
    with pytest.raises(CheckpointError, match="is compressed, and its base has changed since"):
        loop.train(recipe)


@BITS
def test_layers_that_learn_stay_as_they_are(compress: dict[str, Any]) -> None:
    part = "text_tower.transformer.resblocks.0.mlp"
    tree = TINY_MODEL | {"adapters": [compress, LORA], "unfrozen": [part]}
    model = dual_encoder.build(from_tree(ModelConfig, tree), seed=0)
    whole = {name for name, p in model.named_parameters() if p.ndim > 1 and not sharding.is_compressed(p.data)}
    assert f"{part}.c_fc.base_layer.weight" in whole
    model.encode_text(model.tokenizer(["a red fox"]))[:, 0].sum().backward()
    assert model.get_parameter(f"{part}.c_fc.base_layer.weight").grad.abs().sum() > 0


def test_a_tower_that_learns_is_not_compressed() -> None:
    tree = TINY_MODEL | {"adapters": [COMPRESS, LORA], "unfrozen": ["text_tower"]}
    with pytest.raises(ConfigError, match="all linear layers of text_tower are to be trained, and compressed weights"):
        dual_encoder.build(from_tree(ModelConfig, tree), seed=0)


@BITS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_language_model_learns_to_foretell_on_a_compressed_base(
    compress: dict[str, Any], precision: str, shards: Path, tmp_path: Path
) -> None:
    adapters = [compress | {"tower": "text"}, LORA | {"tower": "text"}]
    unfrozen = ["text_tower.projection", "text_decoder.prefix"]
    path = language_models.folder(tmp_path / "lm", language_models.llama())
    model = language_models.tree(path, adapters=adapters, unfrozen=unfrozen)
    objective = {"regularisers": [{"type": "caption", "weight": 1.0}]}
    keys = {"model": model, "objective": objective, "precision": precision}
    run = loop.train(make.tiny_recipe(shards, tmp_path / "run", **keys))
    losses = [row["train/loss/caption"] for row in read_metrics(run.root / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    assert len(captions(load(str(run.root)).model, IMAGES, GenerateConfig(max_length=4))) == 3
