"""`diptych bench data`: the way from shards to batches, against peers in the same run.

Every measurement has a process of its own, on one core; implementations alternate, so that a machine's moods meet all
of them. The floor of throughput is the decoding alone, at the scale that the smallest crop needs, of bytes in memory.
The peer is open_clip's own training pipeline, run by the Python of an environment of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.bench import data_peer
from diptych.bench.data_peer import Request
from diptych.bench.data_pictures import pattern, write_captions, write_many, write_photos
from diptych.bench.machine import processor
from diptych.errors import ConfigError

Measure = Literal["throughput", "memory", "startup", "resume", "tokens", "decoders"]
MEASURES: dict[Measure, tuple[str, ...]] = {
    "throughput": ("floor", "ours", "open_clip", "webdataset"),
    "memory": ("ours", "open_clip"),
    "startup": ("ours", "open_clip"),
    "resume": ("ours",),
    "tokens": ("ours", "open_clip"),
    "decoders": ("ours",),
}
"""What can be measured, and of whom."""
DEFAULT: tuple[Measure, ...] = ("throughput", "memory", "startup", "resume", "tokens")
_TITLES = {
    "images_per_second": "images/s",
    "pss_mib": "MiB per worker, PSS",
    "uss_mib": "MiB per worker, USS",
    "build_seconds": "seconds to a loader",
    "first_batch_seconds": "seconds to the first batch",
    "resume_seconds": "seconds to the first batch after resuming",
    "captions_per_second": "captions/s",
}
_PEER = "open_clip"
_PHOTO_SHARDS = 8
_CAPTION_BATCHES = 80
_TIME_LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    sizes: Sequence[tuple[int, int]] = ((500, 375), (1024, 768))
    """Width and height of the pictures; memory is measured with the first."""
    measures: Sequence[Measure] = DEFAULT
    rounds: int = 3
    batch: int = 256
    batches: int = 3
    """Timed in each process, after a first one."""
    side: int = 224
    """Of the views, pixels."""
    window: int = 5000
    """Samples that are shuffled together where memory is measured; the default on both sides, and not set by this."""
    shards: int = 10_000
    samples_per_shard: int = 1000
    """Of start-up and resuming."""
    peer_python: Path | None = None
    """Of open_clip's environment; none: open_clip is left out."""

    def __post_init__(self) -> None:
        if self.peer_python is not None and not os.access(self.peer_python, os.X_OK):
            raise ConfigError(
                f"there is no Python at {str(self.peer_python)!r} · bench data --peer-python · "
                "make the peer's environment as benchmarks/README.md says"
            )
        unknown = [measure for measure in self.measures if measure not in MEASURES]
        if unknown:
            raise ConfigError(f"unknown measure {unknown[0]!r} · bench data --measures · use {', '.join(MEASURES)}")
        if min(self.rounds, self.batch, self.batches, self.side, self.shards, self.samples_per_shard) < 1:
            raise ConfigError("rounds, batches and sizes must be at least 1 · bench data · give positive numbers")


@dataclass(frozen=True)
class Row:
    """One number of one implementation, over all rounds."""

    title: str
    subject: str
    """The data it was measured with."""
    implementation: str
    value: float
    """Median."""
    spread: tuple[float, float] = (0.0, 0.0)
    """Least and most."""
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    rows: tuple[Row, ...]
    versions: dict[str, dict[str, str]]
    """Implementation → package → version."""
    bytes_per_pixel: dict[str, float] = field(default_factory=dict)
    """Size of the pictures → what their JPEG takes."""


@dataclass(frozen=True)
class _Job:
    """One request that every round makes, and what its answers are about."""

    subject: str
    request: Request


@dataclass(frozen=True)
class _Data:
    """What is measured with. Patterns of shards, empty where nothing was asked for."""

    photos: dict[str, str]
    """Size → shards."""
    bytes_per_pixel: dict[str, float]
    window: str
    many: str
    captions: str


def measure_all(plan: Plan, *, progress: Callable[[str], None], work: Path | None = None) -> Report:
    """Makes the data, measures, and removes the data.

    Args:
        work: folder for the data, about a gigabyte; none: the system's.

    Raises:
        ConfigError: the folder cannot be used.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="diptych-bench-", dir=work) as folder:
            data = _write(plan, Path(folder), progress)
            return _measured(plan, list(_jobs(plan, data)), data, progress)
    except OSError as error:
        raise ConfigError(f"the data cannot be written ({error}) · bench data --work · name another folder") from error


def _write(plan: Plan, folder: Path, progress: Callable[[str], None]) -> _Data:
    photos, density = {}, {}
    window = many = captions = ""
    if {"throughput", "decoders"} & set(plan.measures):
        for size in plan.sizes:
            name, place = f"{size[0]}×{size[1]}", folder / f"photos-{size[0]}-{size[1]}"
            progress(f"making pictures, {name}")
            samples = (1 + plan.batches) * plan.batch
            density[name] = write_photos(place, size, samples, shards=_PHOTO_SHARDS)
            photos[name] = pattern(place, _PHOTO_SHARDS)
    if "memory" in plan.measures:
        progress("making a window of pictures")
        # The peer's buffer begins with a fifth of the window and takes in two samples for each that it gives.
        write_photos(folder / "window", plan.sizes[0], 2 * plan.window, shards=1)
        window = pattern(folder / "window", 1)
    if {"startup", "resume"} & set(plan.measures):
        progress(f"making {plan.shards:,} shards")
        write_many(folder / "many", plan.shards, plan.samples_per_shard)
        many = pattern(folder / "many", plan.shards)
    if "tokens" in plan.measures:
        captions = str(folder / "captions.txt")
        write_captions(Path(captions), _CAPTION_BATCHES * plan.batch)
    return _Data(photos, density, window, many, captions)


def _jobs(plan: Plan, data: _Data) -> Iterator[_Job]:
    """What each round asks."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    width, height = plan.sizes[0]
    asked: list[tuple[Measure, str, str, int]] = [
        *(("throughput", name, shards, plan.batches) for name, shards in data.photos.items()),
        *(("decoders", name, shards, 1) for name, shards in data.photos.items()),
        # By then the peer's buffer is full.
        ("memory", f"window of {plan.window:,}, {width}×{height}", data.window, plan.window * 9 // 10 // plan.batch),
        ("startup", f"{plan.shards:,} shards of {plan.samples_per_shard:,}", data.many, 1),
        ("resume", f"{plan.shards:,} shards of {plan.samples_per_shard:,}", data.many, 1),
        ("tokens", f"{_CAPTION_BATCHES * plan.batch:,} captions", data.captions, 1),
    ]
    for measure, subject, where, batches in asked:
        for name in MEASURES[measure] if measure in plan.measures else ():
            if name != _PEER or plan.peer_python is not None:
                request = Request(measure, name, where, plan.side, plan.batch, max(batches, 1), core)
                yield _Job(subject, request)


def _measured(plan: Plan, jobs: Sequence[_Job], data: _Data, progress: Callable[[str], None]) -> Report:
    answers: dict[_Job, list[dict[str, float]]] = {job: [] for job in jobs}
    problems: dict[_Job, str] = {}
    versions: dict[str, dict[str, str]] = {}
    for number in range(plan.rounds):
        for job in jobs:
            if job in problems:
                continue
            request = job.request
            progress(f"round {number + 1} of {plan.rounds}: {request.measure}, {job.subject}, {request.implementation}")
            found = _in_process(request, plan.peer_python)
            if isinstance(found, str):
                problems[job] = found
            else:
                answers[job].append(found["answer"])
                versions[request.implementation] = found["versions"]
    rows = (row for job in jobs for row in _rows(job, answers[job], problems.get(job)))
    return Report(tuple(rows), versions, data.bytes_per_pixel)


def _rows(job: _Job, answers: Sequence[dict[str, float]], problem: str | None) -> Iterator[Row]:
    request = job.request
    if problem is not None:
        yield Row(request.measure, job.subject, request.implementation, 0.0, problem=problem)
        return
    for name in answers[0]:
        values = [answer[name] for answer in answers]
        spread = (min(values), max(values))
        # Of decoders, each number is that of another implementation.
        title, whose = (_TITLES[name], request.implementation) if name in _TITLES else ("ms per picture", name)
        yield Row(title, job.subject, whose, statistics.median(values), spread)


def _in_process(request: Request, peer_python: Path | None) -> dict[str, Any] | str:
    """The answer of a process of its own, or what went wrong there."""
    module = [sys.executable, "-m", "diptych.bench.data_ours"]
    # Isolated: nothing of ours must be seen by the peer, its script's folder included.
    command = [str(peer_python), "-I", data_peer.__file__] if request.implementation == _PEER else module
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, json.dumps(asdict(request))],
            capture_output=True,
            text=True,
            env=os.environ | one_thread,
            timeout=_TIME_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {_TIME_LIMIT_SECONDS} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return " ".join(lines[-1].split())[:200] if lines else f"died ({done.returncode})"
    return json.loads(done.stdout.splitlines()[-1])


def table(report: Report) -> str:
    """The rows as Markdown, with hardware and versions above."""
    lines = [
        _header(report),
        "",
        "| | data | | median (least, most) | of open_clip's | of the floor |",
        "|---|---|---|--:|--:|--:|",
    ]
    for row in sorted(report.rows, key=lambda row: [r.title for r in report.rows].index(row.title)):
        if row.problem:
            lines.append(f"| {row.title} | {row.subject} | {row.implementation} | {row.problem} | | |")
            continue
        numbers = f"{_short(row.value)} ({_short(row.spread[0])}, {_short(row.spread[1])})"
        peer, floor = (_share(report, row, of) for of in (_PEER, "floor"))
        lines.append(f"| {row.title} | {row.subject} | {row.implementation} | {numbers} | {peer} | {floor} |")
    return "\n".join(lines)


def _header(report: Report) -> str:
    alike: dict[str, list[str]] = {}
    for name, found in report.versions.items():
        alike.setdefault(", ".join(f"{package} {number}" for package, number in found.items()), []).append(name)
    versions = "; ".join(f"{', '.join(names)}: {packages}" for packages, names in alike.items())
    density = ", ".join(f"{size} {value:.2f}" for size, value in report.bytes_per_pixel.items())
    return f"One core of {processor()}; {versions}" + (f"; JPEG bytes per pixel: {density}" if density else "")


def _share(report: Report, row: Row, of: str) -> str:
    """The value relative to another's of the same title and subject."""
    others = [r for r in report.rows if (r.title, r.subject, r.implementation) == (row.title, row.subject, of)]
    if not others or others[0].problem or not others[0].value:
        return ""
    ratio = row.value / others[0].value
    return f"{ratio:.0%}" if of == "floor" else f"{ratio:.2f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_json(report: Report) -> dict[str, Any]:
    """Plain values."""
    return asdict(report)
