"""A measurement in a process of its own, so that no allocator remembers another's peak; and how its memory is read."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diptych.bench.machine import memory, processor
from diptych.errors import DiptychError, one_line


def hardware(device: str) -> str:
    """The device's name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of {processor()}"


def in_process(function: Callable[[Any], Any], setting: Any) -> Any:
    """What `function` returns in a process of its own. Raises DiptychError when that process dies or fails."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, setting, sender))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    process.join()
    if outcome is None:
        raise DiptychError("out of memory" if process.exitcode == -9 else f"died ({process.exitcode})")
    value, problem = outcome
    if problem:
        raise DiptychError(problem)
    return value


def _child(function: Callable[[Any], Any], setting: Any, sender: Any) -> None:
    try:
        outcome = (function(setting), "")
    except Exception as error:  # the boundary of a process
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)
        outcome = (None, "out of memory" if full else f"{type(error).__name__}: {one_line(error, 200)}")
    sender.send(outcome)
    sender.close()


class PeakMeter:
    """The peak of memory from here on, above what is in use now."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the process's peak
            self._before = memory("VmRSS")

    def extra_bytes(self) -> int:
        """Of the allocator on CUDA, of the whole process (resident) elsewhere."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else memory("VmHWM")
        return peak - self._before
