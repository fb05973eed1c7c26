import errno
import json
import os
from pathlib import Path

import pytest
import torch

from diptych.errors import CheckpointError
from diptych.train import checkpoint
from diptych.train.checkpoint import Snapshot


def snapshot(value: float) -> Snapshot:
    return Snapshot({"model": {"w": torch.full((3,), value)}}, {"step": int(value)})


def test_what_is_saved_is_loaded_and_old_ones_go(tmp_path: Path) -> None:
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, snapshot(step), keep_last=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    loaded = checkpoint.load(newest)
    assert loaded.state == {"step": 4}
    assert loaded.tensors["model"]["w"].tolist() == [4.0, 4.0, 4.0]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        checkpoint.load_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_file_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, 1, snapshot(1), keep_last=3)
    file = checkpoint.save(tmp_path, 2, snapshot(2), keep_last=3) / name
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "flip":
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)
    else:
        file.unlink()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000001"
    assert "step-00000002" in caplog.text


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    (checkpoint.save(tmp_path, 1, snapshot(1), keep_last=3) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("fails", ["save_file", "write_text", "fsync"])
def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, snapshot(1), keep_last=3)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"save_file": (checkpoint, "save_file"), "write_text": (Path, "write_text"), "fsync": (os, "fsync")}[fails]
    monkeypatch.setattr(*target, full)
    with pytest.raises(CheckpointError, match=r"the disk is full.*step-00000001 is untouched"):
        checkpoint.save(tmp_path, 2, snapshot(2), keep_last=3)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.verify(tmp_path / "step-00000001") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, Path("/dev/full").open("wb", buffering=0) as device:
        device.write(b"x")
    assert "the disk is full" in checkpoint._cannot_write(caught.value, tmp_path)


def test_a_crash_while_writing_leaves_a_folder_that_the_next_save_removes(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.tmp").mkdir()
    checkpoint.save(tmp_path, 8, snapshot(8), keep_last=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_checkpoint_of_another_format_is_not_read(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, snapshot(1), keep_last=3)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    assert "format 99" in checkpoint.verify(folder)[0]
