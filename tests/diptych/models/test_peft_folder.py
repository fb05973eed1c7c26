"""Adapters in PEFT's layout: small, opened by peft on a transformers CLIP, refused by another base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from diptych.config import from_tree
from diptych.encoder import load
from diptych.errors import CheckpointError, ConfigError
from diptych.export import to_open_clip, to_peft, to_transformers
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.merge import merged
from diptych.testing import TINY_MODEL

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXTS = ["a red fox", "two dogs & a cat", ""]
TOWERS = ({"type": "lora", "tower": "image", "rank": 3}, {"type": "lora", "tower": "text", "rank": 2, "alpha": 3.0})


def build(towers: dict[str, Any], *adapters: dict[str, Any], **keys: Any) -> DualEncoder:
    tree = {"towers": towers, "adapters": list(adapters), "unfrozen": ["logit_scale"]} | keys
    model = dual_encoder.build(from_tree(ModelConfig, tree), seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as if it had learned
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    to_open_clip.export(dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=0), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def in_transformers(tmp_path: Path, base: Path) -> Path:
    to_transformers.export(load(str(base)).model, tmp_path / "clip")
    return tmp_path / "clip"


def features(model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.encode_image(IMAGES), model.encode_text(model.tokenizer(TEXTS))


@pytest.mark.parametrize("source", ["open_clip", "hf"])
@pytest.mark.parametrize("keys", [{}, {"dora": True}, {"rslora": True, "targets": ["q_proj", "v_proj"]}])
def test_an_adapter_gives_the_features_again(
    source: str, keys: dict[str, Any], base: Path, in_transformers: Path, tmp_path: Path
) -> None:
    towers = {"type": source, "name": str(base if source == "open_clip" else in_transformers)}
    tuned = build(towers, *(adapter | keys for adapter in TOWERS))
    difference = to_peft.export(tuned, tmp_path / "adapter")
    assert max(difference.image, difference.text) < 1e-5
    found = load(str(tmp_path / "adapter"))
    assert found.logit_scale == pytest.approx(float(tuned.logit_scale.detach().exp()))
    assert found.logit_scale != pytest.approx(1 / 0.07)
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert size < 0.05 * (base / "open_clip_model.safetensors").stat().st_size


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's, not ours
@pytest.mark.parametrize("source", ["open_clip", "hf"])
def test_peft_opens_it_on_transformers_model(source: str, base: Path, in_transformers: Path, tmp_path: Path) -> None:
    towers = {"type": source, "name": str(base if source == "open_clip" else in_transformers)}
    tuned = build(towers, *TOWERS)
    to_peft.export(tuned, tmp_path / "adapter")
    theirs = transformers.CLIPModel.from_pretrained(in_transformers)
    whole = PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    for file in (*in_transformers.glob("tok*"), *in_transformers.glob("*processor*"), *in_transformers.glob("*.txt")):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    again = load(f"hf:{tmp_path / 'merged'}")
    for found, expected in zip(features(again.model), features(tuned), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's, not ours
def test_an_adapter_of_peft_is_read(in_transformers: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = transformers.CLIPModel.from_pretrained(in_transformers)
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 9}}
    tuned = get_peft_model(
        theirs, LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False, **patterns)
    )
    tuned.save_pretrained(tmp_path / "adapter")
    found = load(str(tmp_path / "adapter"))
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    for file in (*in_transformers.glob("tok*"), *in_transformers.glob("*processor*"), *in_transformers.glob("*.txt")):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    for ours, expected in zip(features(found.model), features(load(f"hf:{tmp_path / 'merged'}").model), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    to_peft.export(build({"type": "open_clip", "name": str(base)}, *TOWERS), tmp_path / "adapter")
    other = dual_encoder.build(from_tree(ModelConfig, TINY_MODEL), seed=1)
    to_open_clip.export(other, base, overwrite=True)
    with pytest.raises(CheckpointError, match="the adapter was learned on other weights than those of open_clip:"):
        load(str(tmp_path / "adapter"))
    facts = json.loads((tmp_path / "adapter" / "diptych.json").read_text())
    for facts["base"], said in ((str(tmp_path / "adapter"), "is an adapter itself"), ("nowhere", "neither a run")):
        (tmp_path / "adapter" / "diptych.json").write_text(json.dumps(facts))
        with pytest.raises(CheckpointError, match=said):
            load(str(tmp_path / "adapter"))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "diptych.json"])
def test_a_damaged_adapter_is_one_line(file: str, base: Path, tmp_path: Path) -> None:
    to_peft.export(build({"type": "open_clip", "name": str(base)}, *TOWERS), tmp_path / "adapter")
    path = tmp_path / "adapter" / file
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="not readable") as caught:
        load(str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unfrozen": ["text_tower.ln_final"]}, "holds LoRA alone, here learned text_tower.ln_final.weight"),
        ({"adapters": [*TOWERS, {"type": "context", "classes": ["a", "b"], "length": 2}]}, "here learned context"),
        ({"adapters": [TOWERS[0], TOWERS[1] | {"dora": True}]}, "PEFT's layout has one dora for all layers"),
        ({"towers": TINY_MODEL["towers"]}, "these towers are of none"),
    ],
)
def test_what_is_no_adapter_is_refused(change: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    keys = {"towers": {"type": "open_clip", "name": str(base)}, "adapters": list(TOWERS)} | change
    with pytest.raises(ConfigError, match=said):
        to_peft.export(build(keys.pop("towers"), *keys.pop("adapters"), **keys), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_merged_adapters_export_as_any_model(base: Path, tmp_path: Path) -> None:
    tuned = build({"type": "open_clip", "name": str(base)}, *TOWERS)
    expected = features(tuned)
    to_transformers.export(merged(tuned), tmp_path / "out")
    for found, wanted in zip(features(load(str(tmp_path / "out")).model), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
