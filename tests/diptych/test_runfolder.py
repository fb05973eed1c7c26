from dataclasses import dataclass
from pathlib import Path

import pytest

from diptych.config import Config, read_yaml
from diptych.errors import CheckpointError, ConfigError, DataError
from diptych.runfolder import Change, RunFolder, differences, prepare, write_text


@dataclass(frozen=True)
class Model(Config):
    width: int = 1


@dataclass(frozen=True)
class Settings(Config):
    model: Model = Model()
    seed: int = 0
    log: str = "a"


def test_differences_are_dotted() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}) == [
        Change("a.c", 2, 4),
        Change("d", 3, None),
        Change("e", None, 5),
    ]


def test_the_same_run_again_and_what_may_change(tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", Settings())
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    prepare(run.root, Settings(log="b"), may_change=["log"])
    assert read_yaml(run.config)["log"] == "b"
    with pytest.raises(ConfigError, match=r"seed: 0 before, 1 now.*--overwrite"):
        prepare(run.root, Settings(seed=1))
    with pytest.raises(CheckpointError, match=r"different model .model.width: 1 before, 2 now"):
        prepare(run.root, Settings(model=Model(2), seed=1))
    assert read_yaml(run.config)["seed"] == 0


def test_without_a_checkpoint_settings_are_free(tmp_path: Path) -> None:
    prepare(tmp_path, Settings())
    prepare(tmp_path, Settings(seed=1))
    assert read_yaml(tmp_path / "config.yaml")["seed"] == 1


def test_only_a_run_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not deleted"):
        RunFolder(tmp_path).remove()
    with pytest.raises(DataError, match="not empty"):
        prepare(tmp_path, Settings())
    RunFolder(prepare(tmp_path / "run", Settings()).root).remove()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_write_keeps_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
