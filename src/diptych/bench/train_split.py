"""Where the time of a step goes: reads the trace of a profiled run, whose ranges are called `diptych.PHASE`.

On a GPU the processor only launches; each kernel counts for the range in which it was launched, whatever the thread.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.errors import DiptychError

_PREFIX = "diptych."
_FIRST = "diptych.data_wait"
"""The range with which a step begins."""
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Split:
    """Milliseconds of a step, the mean of some."""

    steps: int
    wall_ms: float
    host_ms: dict[str, float]
    """Phase → time of the thread that trains, and the rest: together they are the whole."""
    device_ms: dict[str, float]
    """Phase → time of kernels, and `idle`; empty on a CPU."""
    communication_ms: float
    """Of collectives on any thread or stream, at the same time as the others."""


@dataclass(frozen=True)
class _Range:
    """Something that took time, microseconds."""

    name: str
    start: float
    end: float


def split(events: Iterable[Mapping[str, Any]], *, skip: int) -> Split:
    """Reads the `traceEvents` of a Chrome trace.

    Args:
        skip: steps at the beginning that do not count; the last one never does, for nothing says where it ends.

    Raises:
        DiptychError: there are no ranges, or too few steps.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    named = [e for e in complete if e.get("cat") == "user_annotation" and e["name"].startswith(_PREFIX)]
    thread = next((event["tid"] for event in named if event["name"] == _FIRST), None)
    phases = sorted(_ranges(event for event in named if event["tid"] == thread), key=lambda phase: phase.start)
    starts = [phase.start for phase in phases if phase.name == _FIRST][skip:]
    if len(starts) < 2:
        raise DiptychError(f"the trace holds no whole step behind the first {skip} · bench train · profile more steps")
    steps, begin, end = len(starts) - 1, starts[0], starts[-1]
    phases = [phase for phase in phases if begin <= phase.start < end]
    host = _own_times(phases)
    host["rest"] = (end - begin) - sum(host.values())
    kernels = [(where, event) for where, event in _launched(complete) if begin <= where < end]
    talks = [talk for talk in _ranges(filter(_communicates, complete)) if begin <= talk.start < end]
    return Split(
        steps,
        (end - begin) / steps / 1000,
        _per_step(host, steps),
        _per_step(_device_times(kernels, phases, end - begin), steps),
        sum(talk.end - talk.start for talk in talks) / steps / 1000,
    )


def _ranges(events: Iterable[Mapping[str, Any]]) -> list[_Range]:
    return [_Range(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events]


def _communicates(event: Mapping[str, Any]) -> bool:
    """On a GPU the kernel, for there the processor's range is a launch."""
    return event["name"].startswith("gloo:") or (event.get("cat") == "kernel" and event["name"].startswith("nccl"))


def _own_times(phases: Sequence[_Range]) -> dict[str, float]:
    """Time by phase; what a range within a range takes is the inner one's alone."""
    found: dict[str, float] = {}
    around: list[_Range] = []
    for phase in phases:
        while around and around[-1].end <= phase.start:
            around.pop()
        name, length = phase.name.removeprefix(_PREFIX), phase.end - phase.start
        found[name] = found.get(name, 0.0) + length
        if around:
            found[around[-1].name.removeprefix(_PREFIX)] -= length
        around.append(phase)
    return found


def _launched(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, Any]]]:
    """What ran on the device, each with the moment of its launch."""
    launches = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in _LAUNCHES and _correlated(e)}
    ran = (event for event in events if event.get("cat") in _ON_DEVICE and _correlated(event))
    return [(launches[c], event) for event in ran if (c := event["args"]["correlation"]) in launches]


def _correlated(event: Mapping[str, Any]) -> bool:
    return "correlation" in event.get("args", {})


def _device_times(
    kernels: Sequence[tuple[float, Mapping[str, Any]]], phases: Sequence[_Range], wall: float
) -> dict[str, float]:
    """Time of kernels by the phase that launched them, of copies to the device, and of nothing."""
    if not kernels:
        return {}
    found: dict[str, float] = {}
    starts = [phase.start for phase in phases]
    for launch, event in kernels:
        name = _owner(event["name"], launch, phases, starts)
        found[name] = found.get(name, 0.0) + event["dur"]
    busy, until = 0.0, float("-inf")
    for one in sorted(_ranges(event for _, event in kernels), key=lambda r: r.start):
        busy += max(one.end - max(one.start, until), 0.0)
        until = max(until, one.end)
    return found | {"idle": max(wall - busy, 0.0)}


def _owner(name: str, launch: float, phases: Sequence[_Range], starts: Sequence[float]) -> str:
    """The innermost range around the launch, or what the kernel itself says."""
    if "HtoD" in name:
        return "host_to_device"
    if name.startswith("nccl"):
        return "communication"
    for number in range(bisect_right(starts, launch) - 1, -1, -1):
        if launch < phases[number].end:
            return phases[number].name.removeprefix(_PREFIX)
        if phases[number].name == _FIRST:  # no range reaches over the beginning of a step
            break
    return "rest"


def _per_step(times: Mapping[str, float], steps: int) -> dict[str, float]:
    return {name: microseconds / steps / 1000 for name, microseconds in times.items()}
