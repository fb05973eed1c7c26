"""`diptych bench ranks`: seconds and memory of retrieval among many pictures and as many texts, both ways.

Features are random unit vectors, each text right for one picture; those of half precision are stored so, and raised to
float32 block by block. Every measurement has a process of its own
and at most so many seconds. What it holds is the same from the first of all blocks of scores to the last, so one that
ends among them tells the memory too. Time grows with the square of the rows.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.bench.isolated import PeakMeter, in_process
from diptych.bench.machine import memory, processor
from diptych.errors import ConfigError, DiptychError
from diptych_eval import metrics

_CHUNK = 65_536
_MILLION = 1_000_000


@dataclass(frozen=True)
class Setting:
    """One measurement."""

    rows: int
    """Pictures, and as many texts."""
    width: int
    """D, of the features."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """As which they are stored."""
    limit_seconds: float = 600.0
    """It ends then, finished or not."""

    def __post_init__(self) -> None:
        if min(self.rows, self.width) < 1 or self.limit_seconds <= 0:
            raise ConfigError("rows, widths and the limit must be above 0 · bench ranks · give positive numbers")


@dataclass(frozen=True)
class Row:
    """What one process found."""

    rows: int
    width: int
    dtype: str
    seconds: float | None = None
    """None: unfinished."""
    feature_bytes: int = 0
    """Of both sides."""
    extra_bytes: int = 0
    """Peak above what was there when features and right pairs were."""
    peak_bytes: int = 0
    """Of the whole process, Python and torch included."""
    problem: str = ""

    @property
    def hours_of_a_million(self) -> float | None:
        """A million of each side would take as long, by the square."""
        return None if self.seconds is None else self.seconds * (_MILLION / self.rows) ** 2 / 3600


def measure_all(settings: Sequence[Setting], *, progress: Callable[[str], None]) -> list[Row]:
    """One row for each setting.

    Raises:
        ConfigError: this system does not tell a process's memory.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ConfigError("memory is read from /proc · bench ranks · run it on Linux")
    rows = []
    for setting in settings:
        progress(f"{setting.rows:,} x {setting.rows:,}, D = {setting.width}")
        try:
            rows.append(in_process(partial(measure, threads=torch.get_num_threads()), setting))
        except DiptychError as error:
            rows.append(Row(setting.rows, setting.width, setting.dtype, problem=str(error)))
    return rows


def measure(setting: Setting, threads: int) -> Row:
    """In this process, whose peak of memory is forgotten first."""
    torch.set_num_threads(threads)
    dtype = getattr(torch, setting.dtype)
    images, texts = (unit_features(setting.rows, setting.width, seed=seed, dtype=dtype) for seed in (0, 1))
    right = [(row,) for row in range(setting.rows)]
    few = min(setting.rows, 64)
    metrics.ranks_both_ways(images[:few], texts[:few], right[:few])  # what is loaded once
    meter = PeakMeter("cpu")
    start = time.perf_counter()
    seconds = None
    with _at_most(setting.limit_seconds):
        metrics.ranks_both_ways(images, texts, right)
        seconds = time.perf_counter() - start
    extra = meter.extra_bytes()
    size = images.nbytes + texts.nbytes
    return Row(setting.rows, setting.width, setting.dtype, seconds, size, extra, memory("VmHWM"))


def unit_features(rows: int, width: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "N D"]:
    """Random directions; nothing larger than themselves and a chunk is held."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.empty(rows, width, dtype=dtype)
    for chunk in features.split(_CHUNK):
        drawn = torch.empty(chunk.shape).normal_(generator=generator)
        chunk.copy_(drawn.div_(drawn.norm(dim=1, keepdim=True)))
    return features


class _TimeIsUpError(Exception):
    pass


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Leaves the block, without an error, when the time is up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUpError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeIsUpError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, with hardware and versions above."""
    lines = [
        f"{torch.get_num_threads()} threads of {processor()}, torch {torch.__version__}",
        "",
        "| N × N | D | features | seconds | a million: hours | features, GiB | extra MiB | process, GiB |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row.problem:
            lines.append(f"| {row.rows:,} | {row.width} | {row.dtype} | {row.problem} | | | | |")
            continue
        seconds = "unfinished" if row.seconds is None else f"{row.seconds:.1f}"
        hours = "" if row.hours_of_a_million is None else f"{row.hours_of_a_million:.1f}"
        lines.append(
            f"| {row.rows:,} | {row.width} | {row.dtype} | {seconds} | {hours} | {row.feature_bytes / 2**30:.2f} | "
            f"{row.extra_bytes / 2**20:,.0f} | {row.peak_bytes / 2**30:.2f} |"
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(row) | {"hours_of_a_million": row.hours_of_a_million} for row in rows]
