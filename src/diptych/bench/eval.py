"""`diptych bench eval`: zero-shot classification and retrieval of one set, end to end, against clip-benchmark.

Each command has a process of its own, and all of its time counts, from its start to its results; implementations
alternate, so that a machine's moods meet all of them. All open the same folder of a model and read the same shards.
Ours is one command of two tasks, with nothing kept from before; clip-benchmark has a command for each task. The floor
is the model alone: each picture and each text once, in memory. On the CPU: threads are whatever torch takes.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.bench import eval_peer
from diptych.bench.eval_data import MadeSet, peer_views, write_set
from diptych.bench.eval_table import BOTH, FLOOR, OURS, PEERS, Report, Row
from diptych.errors import ConfigError, DiptychError

_PEER_TASKS = ("zeroshot_classification", "zeroshot_retrieval")
_AT = (1, 5, 10)
NAMES = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"} | {
    f"{found}_retrieval_recall@{k}": f"{way}/recall@{k}"
    for found, way in (("image", "text_to_image"), ("text", "image_to_text"))
    for k in _AT
}
"""Figures that both sides report: clip-benchmark's name → ours."""
_TIME_LIMIT_SECONDS = 7200

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    model: str = "open_clip:ViT-B-32"
    """Anything that `diptych export` takes to open_clip."""
    data: Path | None = None
    """Folder in clip-benchmark's layout whose samples have `.cls` and `.txt`; none: one is made."""
    made: MadeSet = field(default_factory=MadeSet)
    batch: int = 64
    """Pictures at a time, of both; the peer's default."""
    workers: int = 4
    """Processes of the peer's loader (its default), threads of ours."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of both; the peer's default on the CPU is bf16."""
    rounds: int = 3
    peer_python: Path | None = None
    """Of clip-benchmark's environment; none: it is left out."""

    def __post_init__(self) -> None:
        if self.peer_python is not None and not os.access(self.peer_python, os.X_OK):
            raise ConfigError(
                f"there is no Python at {str(self.peer_python)!r} · bench eval --peer-python · "
                "make the peer's environment as benchmarks/README.md says"
            )
        numbers = (self.batch, self.workers, self.rounds, self.made.pictures, self.made.classes, self.made.captions)
        if min(numbers) < 1:
            raise ConfigError("rounds, workers and sizes must be at least 1 · bench eval · give positive numbers")


@dataclass(frozen=True)
class _Places:
    """Where things lie."""

    work: Path
    model: Path
    data: Path
    views: tuple[Path, Path]

    def output(self, task: int) -> Path:
        """The peer's results of a task."""
        return self.work / f"peer-{task}.json"


@dataclass(frozen=True)
class _Answer:
    """What a command gave."""

    seconds: float
    cpu_seconds: float
    """Of all its processes and threads."""
    printed: dict[str, Any]


def measure_all(plan: Plan, *, progress: Progress, work: Path | None = None) -> Report:
    """Writes the model and, where none is given, the set; measures; removes them.

    Args:
        work: folder for these; none: the system's.

    Raises:
        ConfigError: the model, the set or the folder cannot be used.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="diptych-bench-", dir=work) as folder:
            return _measured(plan, _prepared(plan, Path(folder).resolve(), progress), progress)
    except OSError as error:
        raise ConfigError(f"the data cannot be written ({error}) · bench eval --work · name another folder") from error


def _prepared(plan: Plan, folder: Path, progress: Progress) -> _Places:
    data = plan.data.resolve() if plan.data is not None else folder / "set"
    if plan.data is None:
        progress("making a set")
        write_set(data, plan.made)
    views = peer_views(data, folder / "views")
    progress("writing the model")
    try:
        _run([sys.executable, "-m", "diptych", "export", plan.model, str(folder / "model"), "--json"])
    except DiptychError as error:
        raise ConfigError(str(error)) from error
    return _Places(folder, folder / "model", data, views)


def _measured(plan: Plan, places: _Places, progress: Progress) -> Report:
    names = (OURS, *(PEERS if plan.peer_python is not None else ()), FLOOR)
    answers: dict[str, list[_Answer]] = {name: [] for name in names}
    problems: dict[str, str] = {}
    for number in range(plan.rounds):
        for name in names:
            if name in problems:
                continue
            progress(f"round {number + 1} of {plan.rounds}: {name}")
            try:
                answers[name].append(_run(_command(name, plan, places, number)))
            except DiptychError as error:
                problems[name] = str(error)
    times = {name: [_times(name, answer) for answer in found] for name, found in answers.items()}
    rows = [_row(name, found, problems.get(name, "")) for name, found in times.items()]
    if all(name in answers and name not in problems for name in PEERS):
        pairs = zip(*(times[name] for name in PEERS), strict=True)
        rows.insert(-1, _row(BOTH, [(one[0] + two[0], one[1] + two[1]) for one, two in pairs], ""))
    first = answers[OURS][0].printed if answers[OURS] else {}
    sizes = answers[FLOOR][0].printed["sizes"] if answers[FLOOR] else {}
    versions = next((answers[name][0].printed for name in PEERS if answers.get(name)), {})
    figures = {OURS: _our_figures(first), BOTH: _peer_figures(places)}
    return Report(tuple(rows), figures, sizes, plan.model, plan.batch, plan.precision, versions)


def _times(name: str, answer: _Answer) -> tuple[float, float]:
    """Seconds by the clock and of the processor; the floor tells its own, without its start."""
    if name == FLOOR:
        return answer.printed["seconds"], answer.printed["cpu_seconds"]
    return answer.seconds, answer.cpu_seconds


def _row(name: str, times: Sequence[tuple[float, float]], problem: str) -> Row:
    if problem:
        return Row(name, problem=problem)
    seconds, cpu = zip(*times, strict=True)
    return Row(name, statistics.median(seconds), (min(seconds), max(seconds)), statistics.median(cpu))


# --- commands ------------------------------------------------------------------------------------------------------


def _command(name: str, plan: Plan, places: _Places, number: int) -> list[str]:
    if name == OURS:
        tasks = places.work / "tasks.yaml"
        tasks.write_text(json.dumps(_our_tasks(plan, places.data)), encoding="utf-8")
        out = places.work / f"ours-{number}"  # a new one each time: features of the last must not help
        words = ["eval", str(places.model), "--config", str(tasks), "--out", str(out), "--json"]
        return [sys.executable, "-m", "diptych", *words]
    if name == FLOOR:
        asked = {"model": str(places.model), "data": str(places.data), "batch": plan.batch, "precision": plan.precision}
        return [sys.executable, "-m", "diptych.bench.eval_floor", json.dumps(asked)]
    # Isolated: nothing of ours must be seen by the peer, its script's folder included.
    return [str(plan.peer_python), "-I", eval_peer.__file__, *_peer_words(PEERS.index(name), plan, places)]


def _our_tasks(plan: Plan, data: Path) -> dict[str, Any]:
    return {
        "tasks": [
            {"type": "zeroshot", "dataset": "set", "root": str(data)},
            {"type": "retrieval", "dataset": "set", "path": str(data / "test")},
        ],
        "embed": {"batch_size": plan.batch, "precision": plan.precision, "threads": plan.workers},
    }


def _peer_words(task: int, plan: Plan, places: _Places) -> list[str]:
    values = {
        "dataset": "wds/set",
        "dataset_root": str(places.views[task]),
        "task": _PEER_TASKS[task],
        "model": f"local-dir:{places.model}",
        "pretrained": "none",  # the folder brings its weights
        "batch_size": str(plan.batch),
        "num_workers": str(plan.workers),
        "output": str(places.output(task)),
    }
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    words += ["--recall_k", *map(str, _AT)]
    return ["eval", *words, *(["--no_amp"] if plan.precision == "fp32" else [])]


def _run(command: Sequence[str]) -> _Answer:
    """The seconds of a process of its own, and the JSON of its last line.

    Raises:
        DiptychError: it failed; the message says how.
    """
    start, used = time.perf_counter(), _cpu_seconds()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            timeout=_TIME_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DiptychError(f"took longer than {_TIME_LIMIT_SECONDS} s") from error
    seconds = time.perf_counter() - start
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        last = " ".join(lines[-1].split())[:200] if lines else f"died ({done.returncode})"
        raise DiptychError(last.removeprefix("diptych: error: "))
    return _Answer(seconds, _cpu_seconds() - used, json.loads(done.stdout.strip().splitlines()[-1]))


def _cpu_seconds() -> float:
    """Of the processes that this one has started and seen end, and of theirs."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


# --- figures -------------------------------------------------------------------------------------------------------


def _our_figures(printed: dict[str, Any]) -> dict[str, float]:
    found = {name: value for task in printed.values() if isinstance(task, dict) for name, value in task.items()}
    return {name: found[name] for name in NAMES.values() if name in found}


def _peer_figures(places: _Places) -> dict[str, float]:
    files = [places.output(task) for task in range(len(PEERS))]
    found = [json.loads(file.read_text(encoding="utf-8"))["metrics"] for file in files if file.is_file()]
    return {NAMES[name]: value for metrics in found for name, value in metrics.items() if name in NAMES}
