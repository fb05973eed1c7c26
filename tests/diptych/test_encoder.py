import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diptych
from diptych import checkpoint
from diptych.checkpoint import Snapshot
from diptych.cli.program import main
from diptych.config import dump
from diptych.data.images import evaluation_view
from diptych.errors import CheckpointError, ConfigError, DiptychError
from diptych.export import to_open_clip, to_transformers
from diptych.models import dual_encoder
from diptych.testing import tiny_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint, whose averaged weights are others."""
    model, average = dual_encoder.build(tiny_model(), seed=1), dual_encoder.build(tiny_model(), seed=2)
    folder = tmp_path / "run"
    folder.mkdir()
    tree = dump(tiny_model()).replace("\n", "\n  ")
    (folder / "config.yaml").write_text(f"model:\n  {tree}\ndata:\n  shards: shards/train\n")
    parts = {"model": model.state_dict(), "ema": average.state_dict()}
    checkpoint.save(folder / "checkpoints", 3, Snapshot(parts, {"samples_seen": 4096}), keep_last=1)
    return folder


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8), "RGBA").convert(mode)


def test_pictures_go_the_way_of_every_evaluation(run: Path) -> None:
    encoder = diptych.load(str(run))
    pictures = [picture(mode, (40, 23)) for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK")]
    plain = [p if p.mode in ("RGB", "RGBA") else p.convert("RGB") for p in pictures]
    views = torch.stack([evaluation_view(p, encoder.image_size) for p in plain])
    found = encoder.encode_image(pictures)
    assert found.equal(encoder.encode_image(views))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6))
    assert encoder.encode_image([]).shape == encoder.encode_text([]).shape == (0, 16)


def test_a_turned_photograph_is_turned_back(run: Path) -> None:
    encoder = diptych.load(str(run))
    upright = picture("RGB", (40, 23))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # "turn me by 90 degrees clockwise"
    assert encoder.encode_image([turned]).equal(encoder.encode_image([upright]))


def test_many_pictures_are_cut_into_batches(run: Path) -> None:
    encoder = diptych.load(str(run))
    pictures = [Image.new("RGB", (16, 16), (i % 256, 0, 0)) for i in range(300)]
    found = encoder.encode_image(pictures)
    assert found.shape == (300, 16)
    torch.testing.assert_close(found[299], encoder.encode_image(pictures[299:])[0], atol=1e-6, rtol=0)


def test_a_run_gives_its_average(run: Path) -> None:
    average = dual_encoder.build(tiny_model(), seed=2).eval()
    with torch.no_grad():
        expected = average.encode_text(average.tokenizer(["a fox"]))
    torch.testing.assert_close(diptych.load(str(run)).encode_text(["a fox"]), expected, atol=1e-6, rtol=0)


def test_one_model_under_all_its_names(run: Path, tmp_path: Path) -> None:
    model = diptych.load(str(run)).model
    to_open_clip.export(model, tmp_path / "theirs")
    to_transformers.export(model, tmp_path / "hub")
    theirs, hub = tmp_path / "theirs", tmp_path / "hub"
    weights = f"open_clip:{theirs / 'open_clip_config.json'}:{theirs / 'open_clip_model.safetensors'}"
    expected = diptych.load(str(run)).encode_text(["a red fox", "x"])
    for name in (f"open_clip:{theirs}", str(theirs), weights, f"hf:{hub}", str(hub)):
        torch.testing.assert_close(diptych.load(name).encode_text(["a red fox", "x"]), expected, atol=1e-5, rtol=0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def lose_a_tensor(path: Path) -> None:
    state = load_file(path)
    state.pop(sorted(state)[0])
    save_file(state, path, metadata={"format": "pt"})


def test_what_cannot_be_opened_is_named_in_one_line(run: Path, tmp_path: Path) -> None:
    model = diptych.load(str(run)).model
    names = {"": "neither", "nowhere": "neither", str(tmp_path): "neither", "open_clip:ViT-B-33": "did you mean"}
    names |= {f"{kind}:{tmp_path}/nowhere": "no such folder" for kind in ("open_clip", "hf")}
    names["open_clip:ViT-B-32:no_such_tag"] = "neither a tag"
    for kind, damage in (("cut", truncate), ("short", lose_a_tensor)):
        to_open_clip.export(model, tmp_path / kind / "theirs")
        to_transformers.export(model, tmp_path / kind / "hub")
        damage(tmp_path / kind / "theirs" / "open_clip_model.safetensors")
        damage(tmp_path / kind / "hub" / "model.safetensors")
        names[str(tmp_path / kind / "theirs")] = "weights do not fit"
        names[str(tmp_path / kind / "hub")] = "do not fit" if kind == "cut" else "1 weights are absent"
    for folder, text, message in (
        ("adapter", "{}", "only LoRA is read"),
        ("bert", json.dumps({"model_type": "bert"}), "'bert' is no dual encoder"),
        ("nothing", "{", "cannot open"),
    ):
        (tmp_path / folder).mkdir()
        file = "adapter_config.json" if folder == "adapter" else "config.json"
        (tmp_path / folder / file).write_text(text)
        names[str(tmp_path / folder)] = message
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "config.yaml").write_text("tasks: []\n")
    names[str(tmp_path / "yaml")] = "it has no model"
    for name, message in names.items():
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            diptych.load(name)
        assert message in str(caught.value), (name, str(caught.value))
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, DiptychError)


def test_the_verb_writes_a_card_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--to", "transformers", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["to"] == "transformers"
    assert max(found["largest_difference"].values()) < 1e-5
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "4,096 samples seen" in text
    assert "shards: shards/train" in text
    assert main(["export", str(run), str(out), "--to", "open_clip", "--quiet"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export", str(run), str(out), "--overwrite", "--quiet"]) == 0
    assert "largest difference of the features, opened by open_clip" in capsys.readouterr().out
    assert not (out / "config.json").exists()
    with pytest.raises(SystemExit) as caught:
        main(["export", str(run), str(out), "--to", "keras"])
    assert caught.value.code == 2
    assert "invalid choice: 'keras'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"]])
def test_help_needs_no_torch(words: list[str]) -> None:
    code = (
        "import sys; from diptych.cli import main\n"
        f"try: main({words})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_the_package_is_light_until_a_model_is_asked_for() -> None:
    code = "import sys, diptych; assert 'torch' not in sys.modules; assert callable(diptych.load)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        diptych.lod  # noqa: B018
