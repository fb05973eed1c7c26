"""What one measured process of training does: open_clip's side, and what both sides share.

This file needs the standard library, the peer's own packages and, of diptych, compat.py alone: it is run by the Python
of the peer's environment. `train_ours.py` answers in the same form.
"""

import json
import logging
import os
import re
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """One measurement."""

    implementation: str
    """One of those in `train.py`, or facts or split."""
    recipe: str
    """YAML file of our run."""
    model: str
    """JSON file of the same model in open_clip's form; empty where it has none."""
    folder: str
    """Of this process alone."""
    shards: str
    """Brace pattern."""
    device: str
    """cpu or cuda."""
    precision: str
    """bf16 or fp32."""
    batch: int
    workers: int
    steps: int
    """All of them, those before the timed ones too."""
    every: int
    """Steps between logged lines, at which alone time is read: reading waits for the device."""
    save_at: int
    """Behind which of them ours-saving makes its checkpoint."""
    compile: bool
    checkpoint_activations: bool
    clip: float | None
    """Largest norm of the gradient."""


Answer = dict[str, Any]
Mark = tuple[int, float]
"""Steps made, and the clock then."""


def main(measures: dict[str, Callable[[Request], Answer]]) -> None:
    """Takes the request from the command line, measures, prints the answer and the versions as JSON."""
    request = Request(**json.loads(sys.argv[1]))
    answer = measures[request.implementation](request)
    versions = {package: version(package) for package in ("torch", "open_clip_torch")}
    sys.stdout.write(json.dumps(answer | {"versions": versions}) + "\n")


def timed(marks: Sequence[Mark], request: Request) -> Answer:
    """What every implementation answers: (steps before it, its steps, its seconds) of each window between two marks,
    and the most memory that was held until now."""
    windows = [(before, now - before, end - start) for (before, start), (now, end) in pairwise(marks)]
    return {"windows": windows, "peak_bytes": peak_bytes(request.device)}


def run_steps(step: Callable[[], None], request: Request) -> Iterator[Mark]:
    """Makes the steps; marks the beginning, and every so many steps the moment when the device has made them."""
    yield 0, clock(request.device)
    for number in range(1, request.steps + 1):
        step()
        if number % request.every == 0:
            yield number, clock(request.device)


def clock(device: str) -> float:
    """Seconds, when the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(device: str) -> int:
    """The most that this process has held until now: tensors on the GPU, or all memory on the CPU."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


# --- the peer ------------------------------------------------------------------------------------------------------


class Clock(logging.Handler):
    """Marks the logged lines of open_clip's trainer: it has just waited for the device, to have the loss."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.marks: list[Mark] = []
        self._batch = batch

    def emit(self, record: logging.LogRecord) -> None:
        """As logging calls it."""
        line = re.match(r"Train Epoch: \d+ \[\s*(\d+)/", record.getMessage())
        if line:
            self.marks.append((int(line[1]) // self._batch, time.perf_counter()))


def trainer_arguments(request: Request) -> list[str]:
    """The command line of open_clip's trainer; without logs it writes no checkpoint."""
    values = {
        "model": Path(request.model).stem,
        "train-data": request.shards,
        "dataset-type": "webdataset",
        "train-num-samples": request.steps * request.batch,
        "epochs": 1,
        "batch-size": request.batch,
        "workers": request.workers,
        "device": request.device,
        "precision": {"bf16": "amp_bf16", "fp32": "fp32"}[request.precision],
        "lr": 1e-4,
        "log-every-n-steps": request.every,
        "logs": "none",
        "name": "run",
    }
    if request.clip is not None:
        values["grad-clip-norm"] = request.clip
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    words += ["--torchcompile"] if request.compile else []
    return words + (["--grad-checkpointing"] if request.checkpoint_activations else [])


def _train(request: Request) -> Answer:
    """open_clip's own trainer on the shards."""
    import importlib

    importlib.import_module("torch")  # what an empty environment lacks first
    _kept = _repair_torchvision()
    import open_clip  # only now

    trainer = importlib.import_module("open_clip_train.main")
    open_clip.add_model_config(request.model)
    os.chdir(request.folder)  # its folder of logs is called `none`
    marks = Clock(request.batch)
    logging.root.addHandler(marks)
    trainer.main(trainer_arguments(request))
    return timed(marks.marks, request)


def _repair_torchvision() -> Any:
    """Beside a CPU build of torch its import fails. To be kept: the repair ends with what is given back."""
    compat = runpy.run_path(str(Path(__file__).parents[1] / "compat.py"))  # by path: diptych is not installed here
    compat["install"]()
    return compat


if __name__ == "__main__":
    main({"open_clip": _train})
