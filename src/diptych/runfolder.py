"""The folder of a run: what is where, and whether a command may write into it.

run/
  config.yaml           the resolved configuration; with it the same command resumes
  metrics.jsonl         one object per logged step
  faults.json           unusable samples by reason and shard, where there were any
  summary.txt           what became of the run, in words
  tensorboard/          the same numbers for the tracker
  wandb_id              of the run at Weights & Biases, where they go there too
  checkpoints/          see diptych.checkpoint
  eval/results.json     see diptych_eval.result
  report.html
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

from diptych.config import Config, dump, read_yaml, to_tree
from diptych.errors import CheckpointError, ConfigError, DataError


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files of the tracker."""
        return self.root / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """What Weights & Biases knows the run by."""
        return self.root / "wandb_id"

    @property
    def summary(self) -> Path:
        """What became of the run, in words."""
        return self.root / "summary.txt"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.root / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Results and what the report draws from."""
        return self.root / "eval"

    @property
    def faults(self) -> Path:
        """Unusable samples by reason and shard."""
        return self.root / "faults.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.root / "report.html"

    @property
    def exists(self) -> bool:
        """Whether this folder holds a run."""
        return self.config.is_file()

    def remove(self) -> None:
        """Deletes the run; refuses a folder that holds something else."""
        if self.root.exists() and any(self.root.iterdir()):
            if not self.exists:
                raise DataError(f"not a run (no config.yaml), so it is not deleted · {self.root} · remove it yourself")
            shutil.rmtree(self.root)


def prepare(root: Path, config: Config, *, may_change: Sequence[str] = ()) -> RunFolder:
    """Opens the run at `root` for writing: a new one, or the same one again.

    Args:
        config: what the run is started with; written to `config.yaml`.
        may_change: dotted keys (or sections; `*` stands for any part) in which a resumed run may differ from its
            beginning.

    Raises:
        DataError: the folder holds something that is not a run.
        CheckpointError: it is a run of another model.
        ConfigError: it is a run with other settings.
    """
    run = RunFolder(root)
    if run.exists and any(run.checkpoints.glob("step-*")):  # without a checkpoint there is nothing to mix up
        _refuse_other_run(run, config, may_change)
    elif not run.exists and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"output folder is not empty and holds no run · {root} · choose another with run=FOLDER")
    run.root.mkdir(parents=True, exist_ok=True)
    write_text(run.config, dump(config))
    return run


def _refuse_other_run(run: RunFolder, config: Config, may_change: Sequence[str]) -> None:
    advice = "choose another folder with run=FOLDER, or start afresh with --overwrite"
    changes = differences(read_yaml(run.config), to_tree(config))
    changes = [
        c for c in changes if not any(fnmatch(c.key, free) or fnmatch(c.key, f"{free}.*") for free in may_change)
    ]
    if model_changes := [change for change in changes if change.key.startswith("model.")]:
        raise CheckpointError(
            f"cannot resume with a different model ({_summary(model_changes)}) · {run.root} · {advice}"
        )
    if changes:
        raise ConfigError(f"the run was started with other settings ({_summary(changes)}) · {run.root} · {advice}")


@dataclass(frozen=True)
class Change:
    """One key with two values."""

    key: str
    before: Any
    after: Any


def differences(before: Any, after: Any, key: str = "") -> list[Change]:
    """The dotted keys in which two configuration trees differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: list[Change] = []
        for name in [*before, *(name for name in after if name not in before)]:
            found += differences(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            change
            for number, (old, new) in enumerate(zip(before, after, strict=True))
            for change in differences(old, new, f"{key}.{number}")
        ]
    return [] if before == after else [Change(key, before, after)]


def _summary(changes: list[Change]) -> str:
    shown = ", ".join(f"{change.key}: {change.before!r} before, {change.after!r} now" for change in changes[:3])
    return shown + (f", and {len(changes) - 3} more" if len(changes) > 3 else "")


def sync(path: Path) -> None:
    """Makes a file's contents, or the renames inside a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step: a crash leaves the old text or the new, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        temporary.replace(path)
    except FileNotFoundError:
        if not path.exists():  # else another process wrote the same file at once, and was first
            raise
