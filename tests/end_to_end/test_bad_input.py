"""Bad input: exit code 2, one clear line on stderr that says what and where, and what was there is still there."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import diptych.testing as make
from diptych import checkpoint
from diptych.cli import main


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a command that must fail with one line holding the given words."""

    def run(arguments: list[object], *words: str) -> None:
        capsys.readouterr()
        assert main([*map(str, arguments), "--quiet"]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("diptych: error: ")
        assert shown.err.count("\n") == 1
        for word in words:
            assert word in shown.err

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"p{number}.png").write_bytes(make.tiny_sample(f"p{number}").members["png"])
    return folder


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    tree: dict[str, Any] = {
        "run": str(tmp_path / "run"),
        "total_samples": 32,
        "global_batch": 8,
        "model": make.TINY_MODEL,
        "data": {"shards": str(shards), "lanes": 2, "workers": 0},
        "log": {"tensorboard": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_data_folder(config: Path, tmp_path: Path, refuses: Callable[..., None]) -> None:
    refuses(["train", config, f"data.shards={tmp_path / 'nowhere'}"], "no", "nowhere")
    (tmp_path / "empty").mkdir()
    refuses(["train", config, f"data.shards={tmp_path / 'empty'}"], "no .tar shards", "empty")
    refuses(["data", "pack", tmp_path / "nowhere", tmp_path / "out"], "no such folder or table", "nowhere")
    refuses(["data", "pack", tmp_path / "empty", tmp_path / "out"], "holds no pictures")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "checkpoints").exists()


def test_table(pictures: Path, tmp_path: Path, refuses: Callable[..., None]) -> None:
    table = pictures / "table.csv"
    table.write_text("image,captoin\np0.png,a dog\n")
    refuses(["data", "pack", table, tmp_path / "out"], "no column 'caption'", "did you mean 'captoin'?", "table.csv")
    table.write_text("file,caption\np0.png,a dog\n")
    refuses(["data", "pack", table, tmp_path / "out"], "no column 'image'", "file, caption")
    assert not (tmp_path / "out").exists()


def test_fewer_captions_than_pictures(pictures: Path, tmp_path: Path, refuses: Callable[..., None]) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("one\ntwo\n")
    command = ["data", "pack", pictures, tmp_path / "out", f"captions_file={captions}"]
    refuses(command, "2 captions for 3 pictures", "captions.txt")


def test_unreadable_picture(pictures: Path, tmp_path: Path, refuses: Callable[..., None]) -> None:
    (pictures / "p1.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    captions = tmp_path / "captions.txt"
    captions.write_text("one\ntwo\nthree\n")
    command = ["data", "pack", pictures, tmp_path / "out", f"captions_file={captions}"]
    refuses(command, "unreadable picture", "p1.png", "on_bad=skip")
    assert not (tmp_path / "out").exists()
    assert main([*map(str, command), "on_bad=skip", "--quiet"]) == 0


def test_configuration(config: Path, tmp_path: Path, refuses: Callable[..., None]) -> None:
    refuses(["train", config, "optim.peek_lr=1"], "unknown key 'optim.peek_lr'", "did you mean 'peak_lr'?")
    refuses(["train", config, "global_batch=many"], "global_batch: 'many' is not integer")
    refuses(["train", config, "global_batch=true"], "global_batch: true is not integer")
    refuses(["train", config, "global_batch=1000"], "total_samples (32) must hold at least one global_batch")
    too_large = ["train", config, "global_batch=1000", "total_samples=1000"]
    refuses(too_large, "global_batch (1000) is larger than the data (40 samples)", "lower global_batch")
    refuses(["train", config, "model.towers.name=ViT-B-23"], "no model 'ViT-B-23'", "did you mean 'ViT-B-32'?")
    refuses(["train", tmp_path / "nowhere.yaml"], "not found", "nowhere.yaml")


def test_a_failed_start_leaves_a_folder_that_the_right_start_can_use(
    config: Path, refuses: Callable[..., None]
) -> None:
    refuses(["train", config, "global_batch=1000", "total_samples=1000"], "larger than the data")
    assert main(["train", str(config), "--quiet"]) == 0


def test_resuming_with_another_model(config: Path, tmp_path: Path, refuses: Callable[..., None]) -> None:
    assert main(["train", str(config), "--quiet"]) == 0
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    before = {path.name: path.read_bytes() for path in newest.iterdir()}
    refuses(["train", config, "model.towers.embed_dim=24"], "different model", "embed_dim: 16 before, 24 now")
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == before
    assert main(["train", str(config), "model.towers.embed_dim=24", "--overwrite", "--quiet"]) == 0


def test_disk_full_while_checkpointing(
    config: Path, tmp_path: Path, refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", str(config), "checkpoint.every_samples=8", "--quiet"]) == 0
    folder = tmp_path / "run" / "checkpoints"
    for file in (folder / "step-00000004").iterdir():  # the last one is gone: there is a step to make again
        file.unlink()
    (folder / "step-00000004").rmdir()

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", no_space)
        refuses(["train", config, "checkpoint.every_samples=8"], "the disk is full", "step-00000003 is untouched")
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000003"]
    assert main(["train", str(config), "checkpoint.every_samples=8", "--quiet"]) == 0


def test_output_that_is_already_there(
    config: Path, pictures: Path, tmp_path: Path, refuses: Callable[..., None]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    captions = tmp_path / "captions.txt"
    captions.write_text("one\ntwo\nthree\n")
    refuses(["data", "pack", pictures, out, f"captions_file={captions}"], "not empty", "--overwrite")
    refuses(["data", "emoji", out], "not empty", "--overwrite")
    refuses(["train", config, f"run={out}"], "not empty", "run=FOLDER")
    refuses(["train", config, f"run={out}", "--overwrite"], "not a run")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_what_is_no_model(tmp_path: Path, refuses: Callable[..., None]) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("tasks: []\n")
    refuses(["eval", tmp_path / "nowhere", "--config", tasks], "neither a run folder, a folder with a model", "nowhere")
    refuses(["eval", "open_clip:ViT-B-23", "--config", tasks], "did you mean 'ViT-B-32'?")
    refuses(["report", tmp_path / "nowhere"], "not a run")


def test_objectives(config: Path, refuses: Callable[..., None]) -> None:
    refuses(["train", config, "objective.contrastive.targets=cwlc"], "did you mean 'cwcl'")
    refuses(["train", config, "objective.contrastive.weights=[decoupled, decoupled]"], "twice")
    refuses(["train", config, "objective.contrastive.targets=same_label"], "the data brings none", "data.labels")
    refuses(["train", config, "objective.contrastive.similarity=heads"], "no multiple of 3 heads", "use one of")
    refuses(
        ["train", config, "objective.contrastive.gather={scope: group, group_size: 2}"], "groups of 2", "use one of 1"
    )


def test_benchmarks(refuses: Callable[..., None]) -> None:
    refuses(["bench", "loss", "--rows", "many"], "--rows", "8192,16384")
    refuses(["bench", "loss", "--against", "nobody"], "unknown implementation", "open_clip")
