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
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych import runfolder
from diptych.errors import CheckpointError, one_line

log = logging.getLogger(__name__)
_FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint: named tensor files and plain values."""

    tensors: dict[str, dict[str, Tensor]]
    """File stem (`model`, `ema`, `optimizer`) → name → tensor."""
    state: dict[str, Any] = field(default_factory=dict)
    """What JSON can hold."""


def save(folder: Path, step: int, snapshot: Snapshot, *, keep_last: int, keep_every_samples: int | None = None) -> Path:
    """Writes `folder/step-…` and removes older checkpoints. Called by one rank.

    Args:
        keep_last: the newest that stay.
        keep_every_samples: the first one at or behind each multiple of it stays, too.

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
        runfolder.sync(folder)
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as a RuntimeError of its own
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_cannot_write(error, folder)) from error
    for old in _superfluous(folder, keep_last, keep_every_samples):
        shutil.rmtree(old)
    return final


def _superfluous(folder: Path, keep_last: int, keep_every_samples: int | None) -> list[Path]:
    """Checkpoints that neither rule keeps."""
    old = _folders(folder)[keep_last:]
    if keep_every_samples is None:
        return old
    passed, kept = 0, set()
    for checkpoint in reversed(_folders(folder)):
        multiples = _samples_seen(checkpoint) // keep_every_samples
        if multiples > passed:
            kept.add(checkpoint)
        passed = max(passed, multiples)
    return [checkpoint for checkpoint in old if checkpoint not in kept]


def _samples_seen(checkpoint: Path) -> int:
    """Of a damaged one, 0."""
    try:
        return int(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["samples_seen"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _cannot_write(error: Exception, folder: Path) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error).lower()
    reason = "the disk is full" if full else one_line(error, None)
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
        runfolder.sync(path)
    runfolder.sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Writer:
    """Saves in a thread, while the run goes on: one checkpoint at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="diptych-checkpoint")
        self._writing: Future[Path] | None = None

    def begin(self, write: Callable[[], Path]) -> None:
        """Begins to save, after `finish`. Nothing that `write` uses may change meanwhile."""
        assert self._writing is None, "the checkpoint before has not been waited for"
        self._writing = self._thread.submit(write)

    def finish(self) -> None:
        """Waits for what was begun. Raises what it raised: CheckpointError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits, whatever comes of it."""
        self._thread.shutdown(wait=True)


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


def all_of(run: Path) -> list[Path]:
    """The checkpoints of a run folder, or the one that the path is; oldest first.

    Raises:
        CheckpointError: it is neither.
    """
    if (run / "manifest.json").is_file() or run.name.startswith("step-"):
        return [run]
    found = _folders(run / "checkpoints") if (run / "checkpoints").is_dir() else _folders(run)
    if not found:
        raise CheckpointError(f"no checkpoint · {run} · name a run folder or one of its checkpoints/step-…")
    return found[::-1]


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


@dataclass(frozen=True)
class Summary:
    """A line about a checkpoint."""

    name: str
    samples_seen: int
    bytes: int
    parts: tuple[str, ...]
    """Its tensor files, without extension."""


def summary(checkpoint: Path) -> Summary:
    """What can be said of a checkpoint without reading its tensors."""
    parts = tuple(sorted(path.stem for path in checkpoint.glob("*.safetensors")))
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    return Summary(checkpoint.name, _samples_seen(checkpoint), size, parts)


def differences(one: Path, two: Path) -> list[dict[str, str]]:
    """What differs between two checkpoints: part, name and, in words, what; tensors one at a time in memory.

    Raises:
        CheckpointError: one of them is damaged.
    """
    for checkpoint in (one, two):
        if problems := verify(checkpoint):
            raise CheckpointError(f"damaged checkpoint ({'; '.join(problems)}) · {checkpoint} · choose another")
    found = [
        {"part": "state", "name": change.key, "what": f"{change.before!r}, {change.after!r}"}
        for change in runfolder.differences(_state(one), _state(two))
    ]
    parts = sorted({path.stem for checkpoint in (one, two) for path in checkpoint.glob("*.safetensors")})
    return found + [line for part in parts for line in _tensor_differences(one, two, part)]


def _state(checkpoint: Path) -> Any:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def _tensor_differences(one: Path, two: Path, part: str) -> Iterator[dict[str, str]]:
    paths = [checkpoint / f"{part}.safetensors" for checkpoint in (one, two)]
    if missing := [path for path in paths if not path.is_file()]:
        yield {"part": part, "name": "", "what": f"not in {missing[0].parent}"}
        return
    with safe_open(paths[0], "pt") as first, safe_open(paths[1], "pt") as second:
        names = (set(first.keys()), set(second.keys()))
        for name in sorted(names[0] | names[1]):
            if name in names[0] and name in names[1]:
                what = _difference(first.get_tensor(name), second.get_tensor(name))
            else:
                what = f"only in {(two, one)[name in names[0]]}"
            if what:
                yield {"part": part, "name": name, "what": what}


def _difference(one: Tensor, two: Tensor) -> str:
    """Empty where they are the same to the bit (NaN equals NaN)."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return f"{one.dtype} {list(one.shape)}, {two.dtype} {list(two.shape)}"
    if torch.equal(one.nan_to_num(), two.nan_to_num()) and torch.equal(one.isnan(), two.isnan()):
        return ""
    apart = (one.double() - two.double()).abs().nan_to_num(torch.inf)
    return f"{int((apart > 0).sum())} of {one.numel()} values, by {float(apart.max()):.3g} at most"
