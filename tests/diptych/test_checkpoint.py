import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from diptych import checkpoint
from diptych.checkpoint import Snapshot
from diptych.cli import main
from diptych.errors import CheckpointError


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


def at(samples: int, value: float = 0.0) -> Snapshot:
    return Snapshot(
        {"model": {"w": torch.full((3,), value), "n": torch.tensor([float("nan")])}}, {"samples_seen": samples}
    )


def test_some_stay_for_good(tmp_path: Path) -> None:
    for step, samples in enumerate((40, 80, 120, 160, 200, 390, 400, 410), start=1):
        checkpoint.save(tmp_path, step, at(samples), keep_last=2, keep_every_samples=100)
    kept = [json.loads((path / "state.json").read_text())["samples_seen"] for path in sorted(tmp_path.iterdir())]
    assert kept == [120, 200, 390, 400, 410]


def test_saving_in_a_thread_writes_what_was_and_tells_of_failure(tmp_path: Path) -> None:
    writer = checkpoint.Writer()
    for step in (1, 2):
        writer.begin(partial(checkpoint.save, tmp_path, step, snapshot(step), keep_last=5))
        writer.finish()
    writer.finish()  # nothing is under way
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
    (tmp_path / "file").write_text("in the way")
    writer.begin(partial(checkpoint.save, tmp_path / "file", 3, snapshot(3), keep_last=5))
    with pytest.raises(CheckpointError, match="not written"):
        writer.finish()
    writer.close()


def test_differences_name_part_and_size(tmp_path: Path) -> None:
    one = checkpoint.save(tmp_path / "a", 1, at(10, 1.0), keep_last=2)
    two = checkpoint.save(tmp_path / "b", 1, at(20, 1.5), keep_last=2)
    assert checkpoint.differences(one, one) == []
    assert checkpoint.differences(one, two) == [
        {"part": "state", "name": "samples_seen", "what": "10, 20"},
        {"part": "model", "name": "w", "what": "3 of 3 values, by 0.5 at most"},
    ]
    other = checkpoint.save(
        tmp_path / "c", 1, Snapshot({"ema": {"w": torch.zeros(2)}}, {"samples_seen": 10}), keep_last=2
    )
    assert {line["part"] for line in checkpoint.differences(one, other)} == {"ema", "model"}


def test_the_command_line_looks_into_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "run" / "checkpoints", step, at(10 * step, step), keep_last=2)
    run = str(tmp_path / "run")
    assert main(["checkpoint", "ls", run, "--json"]) == 0
    assert [one["samples_seen"] for one in json.loads(capsys.readouterr().out)["checkpoints"]] == [10, 20]
    assert main(["checkpoint", "verify", run]) == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert main(["checkpoint", "diff", run, str(newest.with_name("step-00000001"))]) == 0
    assert "3 of 3 values, by 1 at most" in capsys.readouterr().out
    (newest / "model.safetensors").write_bytes(b"short")
    assert main(["checkpoint", "verify", run]) == 2
    assert "model.safetensors has 5 of" in capsys.readouterr().out
    assert main(["checkpoint", "ls", str(tmp_path / "nowhere")]) == 2
    assert "no checkpoint · " in capsys.readouterr().err
