"""A teacher is the model that it was, frozen, and looks at pictures of any size as its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.config import from_tree
from diptych.errors import CheckpointError, ConfigError
from diptych.export.to_open_clip import export
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.teacher import build_teacher, resized
from diptych.testing import TINY_MODEL

TOWERS = TINY_MODEL["towers"]
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def model(**keys: Any) -> ModelConfig:
    return from_tree(ModelConfig, {"towers": TOWERS} | keys)


def of_folder(folder: Path, **keys: Any) -> ModelConfig:
    return from_tree(ModelConfig, {"towers": {"type": "open_clip", "name": str(folder)} | keys})


@pytest.fixture
def trained(tmp_path: Path) -> tuple[DualEncoder, Path]:
    """A model with weights and a scale of its own, and the folder that it was exported to."""
    source = dual_encoder.build(model(), seed=7).eval()
    source.logit_scale.data.fill_(3.25)
    export(source, tmp_path / "teacher")
    return source, tmp_path / "teacher"


def test_it_is_the_model_that_was_exported(trained: tuple[DualEncoder, Path]) -> None:
    source, folder = trained
    teacher = build_teacher(of_folder(folder, vision={"patch_dropout": 0.5}))
    tokens = teacher.model.tokenizer(["a fox", "b", "c", "d"])
    found = teacher.embed(IMAGES, tokens)
    with torch.no_grad():
        expected = source(IMAGES, source.tokenizer(["a fox", "b", "c", "d"]))
    assert found.image_features.equal(expected.image_features)  # with all patches
    assert found.text_features.equal(expected.text_features)
    assert teacher.logit_scale == pytest.approx(np.exp(3.25), rel=1e-6)


def test_it_learns_nothing(trained: tuple[DualEncoder, Path]) -> None:
    teacher = build_teacher(of_folder(trained[1]))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    assert not teacher.embed(IMAGES, teacher.model.tokenizer(["a"] * 4)).image_features.requires_grad


def test_building_it_draws_nothing(trained: tuple[DualEncoder, Path]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_teacher(of_folder(trained[1]))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (model(), "weights are random"),
        (model(towers={"type": "pair", "image": TOWERS, "text": TOWERS}), "not trained together"),
        (model(frozen=["image_tower"]), r"frozen as a whole · teacher\.frozen"),
        (model(towers=TOWERS | {"name": "ViT-B-33"}), "the teacher cannot be built: .*did you mean"),
    ],
    ids=["random", "pair", "frozen", "name"],
)
def test_what_cannot_teach_is_refused(config: ModelConfig, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_teacher(config)


def test_weights_that_are_missing_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"the teacher cannot be built: weights 'absent\.pt'"):
        build_teacher(model(towers=TOWERS | {"weights": "absent.pt"}))


@pytest.mark.parametrize("size", [8, 10, 24])
def test_pictures_are_resized_as_pillow_does(size: int) -> None:
    mild = IMAGES // 2 + 64  # Pillow cuts what overshoots the range, and rounds, between its two passes
    found = resized(mild, size)
    assert found.dtype == torch.uint8
    for ours, image in zip(found, mild, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
        theirs = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert (ours.int() - theirs.int()).abs().max() <= 1
    assert resized(IMAGES, 16) is IMAGES
