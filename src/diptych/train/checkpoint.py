"""Checkpoint folders: written whole or not at all, checked before use, nothing in them ever unpickled.

run/checkpoints/
  step-00001200/
    model.safetensors       weights
    ema.safetensors         averaged weights, when the run keeps them
    objective.safetensors   queues, tables of samples and parameters of the loss, when it has any
    optimizer.safetensors   `PARAMETER/exp_avg`, `PARAMETER/exp_avg_sq`, `PARAMETER/step`
    state.json              step, samples_seen, data cursors, number of EMA updates
    manifest.json           size and SHA-256 of each file above; written last

A checkpoint is made in `.step-….tmp`, every file is synced to disk, then the folder is renamed. A crash leaves the old
checkpoints and perhaps a temporary folder, which the next save removes.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.errors import CheckpointError

log = logging.getLogger(__name__)
_FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint: named tensor files and plain values."""

    tensors: dict[str, dict[str, Tensor]]
    """File stem (`model`, `ema`, `optimizer`) → name → tensor."""
    state: dict[str, Any] = field(default_factory=dict)
    """What JSON can hold."""


def save(folder: Path, step: int, snapshot: Snapshot, *, keep_last: int) -> Path:
    """Writes `folder/step-…` and removes older checkpoints beyond `keep_last`. Called by one rank.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; older checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".step-*.tmp"):
            shutil.rmtree(stale)
        temporary.mkdir()
        _write(temporary, snapshot)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as a RuntimeError of its own
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_cannot_write(error, folder)) from error
    for old in _folders(folder)[keep_last:]:
        shutil.rmtree(old)
    return final


def _cannot_write(error: Exception, folder: Path) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error).lower()
    reason = "the disk is full" if full else " ".join(str(error).split())
    kept = _folders(folder)
    intact = f"{kept[0].name} is untouched" if kept else "none was there before"
    return f"checkpoint not written ({reason}) · {folder} · {intact}; free space and start the same command again"


def _write(folder: Path, snapshot: Snapshot) -> None:
    for stem, tensors in snapshot.tensors.items():
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / f"{stem}.safetensors")
    (folder / "state.json").write_text(json.dumps(snapshot.state), encoding="utf-8")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folders(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint: one phrase per damaged file, nothing when it is intact."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return ["manifest.json is missing or unreadable"]
    if manifest.get("format") != _FORMAT:
        return [f"written in format {manifest.get('format')}, this version reads {_FORMAT}"]
    problems = []
    for name, facts in files.items():
        path = checkpoint / Path(name).name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} of {facts['bytes']} bytes")
        elif _sha256(path) != facts["sha256"]:
            problems.append(f"{name} differs from its checksum")
    return problems


def newest(folder: Path) -> Path | None:
    """The newest intact checkpoint, with a warning for every damaged newer one; None when there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    damaged = []
    for checkpoint in _folders(folder):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint
        damaged.append(checkpoint.name)
        log.warning("damaged checkpoint passed over: %s (%s)", checkpoint, "; ".join(problems))
    if damaged:
        raise CheckpointError(f"no intact checkpoint ({', '.join(damaged)}) · {folder} · start afresh with --overwrite")
    return None


def load(checkpoint: Path) -> Snapshot:
    """The contents of a checkpoint that `newest` or `verify` has found intact."""
    stems = [path.stem for path in checkpoint.glob("*.safetensors")]
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return Snapshot({stem: load_file(checkpoint / f"{stem}.safetensors") for stem in stems}, state)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights to use from a run's checkpoint folder: averaged ones where they were kept, else the last.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        raise CheckpointError(f"no checkpoint yet · {folder} · train first, or check the path")
    averaged = checkpoint / "ema.safetensors"
    return load_file(averaged if averaged.is_file() else checkpoint / "model.safetensors")
