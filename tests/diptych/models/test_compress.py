"""A base in eight bits: nearly the same features, a quarter of the memory, exact in itself."""

from pathlib import Path

import pytest
import torch

import diptych.testing as make
from diptych.config import from_tree
from diptych.encoder import load
from diptych.errors import CheckpointError, ConfigError
from diptych.export.to_open_clip import export
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.merge import merged
from diptych.testing import TINY_MODEL
from diptych.train import loop

pytest.importorskip("torchao", reason="needs the extra `compress`")

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LORA = {"type": "lora", "rank": 2}
COMPRESS = {"type": "compress"}


def build(*adapters: dict[str, object], seed: int = 0) -> DualEncoder:
    return dual_encoder.build(from_tree(ModelConfig, TINY_MODEL | {"adapters": list(adapters)}), seed=seed).eval()


@torch.no_grad()
def features(model: DualEncoder) -> torch.Tensor:
    return torch.cat([model.encode_image(IMAGES), model.encode_text(model.tokenizer(["a red fox", "cat"]))])


def test_features_hardly_change() -> None:
    plain, small = build(), build(COMPRESS, LORA)
    assert features(small).mul(features(plain)).sum(1).min() > 0.999
    weight = small.text_tower.transformer.resblocks[0].mlp.c_fc.base_layer.weight
    assert weight.qdata.dtype == torch.int8
    with pytest.raises(ConfigError, match="compressed weights take nothing in"):
        merged(small)


def test_a_run_on_a_compressed_base_resumes_exactly_and_opens(shards: Path, tmp_path: Path) -> None:
    keys = {"total_samples": 48, "ema_decay": 0.9, "model": TINY_MODEL | {"adapters": [COMPRESS, LORA]}}
    whole = loop.train(make.tiny_recipe(shards, tmp_path / "whole", **keys))
    parts = make.tiny_recipe(shards, tmp_path / "parts", **keys)
    loop.train(parts)
    make.forget_after(tmp_path / "parts", 3)
    loop.train(parts)
    first, second = (load(str(tmp_path / name)) for name in ("whole", "parts"))
    assert features(first.model).equal(features(second.model))
    assert not features(first.model).equal(features(build(COMPRESS, LORA)))
    towers = {"type": "run", "run": str(whole.root)}
    plain = dual_encoder.build(from_tree(ModelConfig, {"towers": towers}), seed=0).eval()
    torch.testing.assert_close(features(plain), features(first.model), atol=1e-5, rtol=0)


def test_another_base_is_not_resumed_on(shards: Path, tmp_path: Path) -> None:
    export(build(), tmp_path / "base")
    model = {"towers": {"type": "open_clip", "name": str(tmp_path / "base")}, "adapters": [COMPRESS, LORA]}
    recipe = make.tiny_recipe(shards, tmp_path / "run", model=model)
    loop.train(recipe)
    make.forget_after(tmp_path / "run", 3)
    export(build(seed=1), tmp_path / "base", overwrite=True)
    with pytest.raises(CheckpointError, match="is compressed, and its base has changed since"):
        loop.train(recipe)


def test_compressed_weights_do_not_learn() -> None:
    tree = TINY_MODEL | {"adapters": [COMPRESS, LORA], "unfrozen": ["text_tower.transformer"]}
    with pytest.raises(ConfigError, match=r"text_tower\.transformer.* is to be trained, and compressed weights cannot"):
        dual_encoder.build(from_tree(ModelConfig, tree), seed=0)
