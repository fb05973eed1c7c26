import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diptych.errors import ConfigError
from diptych.export import to_onnx
from diptych.models import dual_encoder
from diptych.models.dual_encoder import DualEncoder, ModelConfig
from diptych.models.towers.hf import HfTowers

PRESENT = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not PRESENT, reason="needs the extra `onnx`")
TEXTS = ["a red fox", "", "a photo of a cat on the red grass of a fox " * 9]
WITHOUT_TORCH = """
import sys
import numpy as np, onnxruntime
from tokenizers import Tokenizer
folder, one_higher = sys.argv[1], sys.argv[2] == "1"
found = Tokenizer.from_file(f"{folder}/tokenizer.json").encode_batch(["a red fox", "", sys.argv[3]])
tokens = np.array([caption.ids for caption in found])
if one_higher:
    tokens = (tokens + 1) * np.array([caption.attention_mask for caption in found])
pixels = np.load(f"{folder}/pixels.npy")
(image,) = onnxruntime.InferenceSession(f"{folder}/image.onnx").run(None, {"pixels": pixels})
(text,) = onnxruntime.InferenceSession(f"{folder}/text.onnx").run(None, {"tokens": tokens})
np.savez(f"{folder}/found.npz", image=image, text=text)
assert "torch" not in sys.modules
"""


def check(model: DualEncoder, folder: Path, *, one_higher: bool) -> None:
    """A process without torch gives the same features, for other numbers of pictures and captions than were traced."""
    import numpy as np

    difference = to_onnx.export(model, folder)
    assert max(difference.image, difference.text) < 1e-5
    size, generator = model.image_size, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, size, size), dtype=torch.uint8, generator=generator)
    np.save(folder / "pixels.npy", images.numpy())
    words = [str(folder), "1" if one_higher else "0", TEXTS[2]]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], check=True, timeout=120)
    found = np.load(folder / "found.npz")
    with torch.no_grad():
        image, text = model.eval().encode_image(images), model.encode_text(model.tokenizer(TEXTS))
    torch.testing.assert_close(torch.from_numpy(found["image"]), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(found["text"]), text, atol=1e-5, rtol=0)
    assert (text[0] - text[1]).abs().max() > 0.01


@needs_onnx
@pytest.mark.parametrize(
    "vision",
    [{}, {"layers": [1, 1, 1, 1], "image_size": 32}, {"timm_model_name": "test_convnext2", "image_size": 32}],
    ids=["vit", "resnet", "timm"],
)
def test_towers_of_open_clip(tmp_path: Path, make: Callable[..., DualEncoder], vision: dict) -> None:
    check(make(vision=vision), tmp_path / "out", one_higher=False)


@needs_onnx
def test_towers_of_transformers(tmp_path: Path, siglip: Path) -> None:
    check(dual_encoder.build(ModelConfig(towers=HfTowers(str(siglip))), seed=0), tmp_path / "out", one_higher=True)


@needs_onnx
def test_a_tokenizer_that_is_code_has_no_file(tmp_path: Path, make: Callable[..., DualEncoder]) -> None:
    to_onnx.export(make(text={"tokenizer_kwargs": {"clean": "canonicalize"}}), tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert "The tokenizer has no file" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.skipif(PRESENT, reason="the extra is there")
def test_without_the_extra_it_is_named(tmp_path: Path, make: Callable[..., DualEncoder]) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'diptych\[onnx\]'"):
        to_onnx.export(make(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
