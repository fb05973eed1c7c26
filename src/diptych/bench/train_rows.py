"""From what processes of `diptych bench train` answered to figures."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.bench.train_plan import PEER, Plan
from diptych.bench.train_split import Split

_PADS = (PEER, f"{PEER}-step")
"""Whose captions are as long as the text tower's context."""
_FIVE_MINUTES = 300


@dataclass(frozen=True)
class Row:
    """One implementation, over all rounds."""

    implementation: str
    samples_per_second: float = 0.0
    """Median of the rounds, each the median of its windows."""
    spread: tuple[float, float] = (0.0, 0.0)
    """Least and most of the rounds."""
    seconds_per_step: float = 0.0
    peak_bytes: int = 0
    """Of the training process: tensors on a GPU, or its whole memory on a CPU."""
    tokens: int = 0
    """Of each caption; of ours, the median of the first batches."""
    flops_per_sample: float = 0.0
    """Of the towers, forward and backward, as executed."""
    mfu: float = 0.0
    """Those operations as a share of what the device can do."""
    problem: str = ""


@dataclass(frozen=True)
class Saving:
    """What one asynchronous checkpoint costs the loop: the median of the rounds, the least, the most."""

    written_seconds: tuple[float, float, float]
    """As long as the windows take in which it is written."""
    stall_seconds: tuple[float, float, float]
    """By how much the first of them is longer than those before."""
    lost_seconds: tuple[float, float, float]
    """By how much all of them are."""

    @property
    def share(self) -> float:
        """What is lost of the time of a run that saves every five minutes."""
        return self.lost_seconds[0] / _FIVE_MINUTES


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    command: str
    batch: int
    facts: dict[str, Any]
    """Of the model and the device; see `train_ours`."""
    rows: tuple[Row, ...]
    saving: Saving | None
    split: Split | None
    problem: str
    """Of the split."""
    versions: dict[str, dict[str, str]]
    """Implementation → package → version."""


def row(name: str, answers: Sequence[Mapping[str, Any]], plan: Plan, facts: Mapping[str, Any]) -> Row:
    """The figures of one implementation."""
    by_round = [found for answer in answers if (found := _rates(answer, plan))]
    if not by_round:
        return Row(name, problem=f"no {plan.every} steps behind the first {plan.warmup} were timed")
    medians = [statistics.median(rates) for rates in by_round]
    rate = statistics.median(medians)
    padded = "padded_" if name in _PADS else ""
    flops = facts[f"{padded}flops_per_sample"]
    return Row(
        name,
        rate,
        (min(medians), max(medians)),
        plan.batch / rate,
        int(statistics.median(answer["peak_bytes"] for answer in answers)),
        facts[f"{padded}tokens"],
        flops,
        rate * flops / facts["peak_flops"],
    )


def _rates(answer: Mapping[str, Any], plan: Plan) -> list[float]:
    """Samples per second of the whole windows behind the warm-up."""
    windows = answer["windows"]
    return [plan.batch * n / seconds for first, n, seconds in windows if first >= plan.warmup and n == plan.every]


def saving(answers: Sequence[Mapping[str, Any]], plan: Plan) -> Saving | None:
    """What a checkpoint costs, from the answers of `ours-saving`; None where there are none."""
    if not answers:
        return None
    windows = [_while_writing(answer, plan) for answer in answers]
    usual = [_usual(answer, plan) for answer in answers]
    pairs = list(zip(windows, usual, strict=True))
    return Saving(
        _spread([sum(found) for found in windows]),
        _spread([found[0] - normal for found, normal in pairs]),
        _spread([sum(found) - len(found) * normal for found, normal in pairs]),
    )


def _while_writing(answer: Mapping[str, Any], plan: Plan) -> list[float]:
    """Seconds of the windows that began before the checkpoint was complete; the first begins with it."""
    behind = [seconds for first, _, seconds in answer["windows"] if first >= plan.saving_step]
    until_end = [sum(behind[number:]) for number in range(len(behind))]
    later = [left > answer["written_before_end"] for left in until_end[1:]]
    return [behind[0], *(seconds for seconds, counts in zip(behind[1:], later, strict=True) if counts)]


def _usual(answer: Mapping[str, Any], plan: Plan) -> float:
    """Seconds of a window behind the warm-up and before the checkpoint."""
    windows = answer["windows"]
    return statistics.median(s for first, _, s in windows if plan.warmup <= first < plan.saving_step)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)
