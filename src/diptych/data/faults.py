"""Samples that cannot be used: the reasons, the counters and the limit. Counted, never hidden.

Reasons: `no_picture`, `undecodable`, `too_large`, `no_caption`, `bad_caption`, `no_hard_caption`, `bad_label`,
`unreadable` (the shard's file gave no bytes), and of whole shards `truncated`, `broken_tar`, `trailing_data`,
`missing_shard`, `unreachable_shard`. A shard's own fault counts as one sample where nobody knows how many are lost;
shards that are out of reach are limited as a share of all shards besides.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from diptych.errors import DataError

_MIN_SAMPLES = 1000
"""Fewer samples than this say nothing about a fraction."""
_LOST = ("missing_shard", "unreachable_shard")
_EXAMPLES = 5


class UnusableSample(Exception):
    """Raised while a sample is prepared; `reason` is the name it is counted under (`undecodable`, `no_caption`, …)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Fault(NamedTuple):
    """One unusable sample that was passed over."""

    reason: str
    shard: str
    key: str
    """Empty where the shard itself is at fault."""


@dataclass
class FaultLog:
    """Counts of a run, or of a part of it."""

    samples: int = 0
    """Samples read, unusable ones included."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(shard, reason) → unusable samples."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason → the first few places, `shard/key`."""

    def add(self, usable: int, faults: Iterable[Fault]) -> None:
        """Counts `usable` good samples and the faults beside them."""
        self.samples += usable
        for fault in faults:
            self.samples += 1
            self.counts[fault.shard, fault.reason] += 1
            self._note(fault.reason, f"{fault.shard} {fault.key}".strip())

    def merge(self, other: "FaultLog") -> None:
        """Adds another part's counts."""
        self.samples += other.samples
        self.counts.update(other.counts)
        for reason, places in other.examples.items():
            for place in places:
                self._note(reason, place)

    def _note(self, reason: str, place: str) -> None:
        noted = self.examples.setdefault(reason, [])
        if len(noted) < _EXAMPLES and place not in noted:
            noted.append(place)

    @property
    def unusable(self) -> int:
        """Unusable samples in all."""
        return self.counts.total()

    @property
    def by_reason(self) -> dict[str, int]:
        """Unusable samples by reason, most frequent first."""
        found: Counter[str] = Counter()
        for (_, reason), count in self.counts.items():
            found[reason] += count
        return dict(found.most_common())

    @property
    def by_shard(self) -> dict[str, int]:
        """Unusable samples by shard, worst first."""
        found: Counter[str] = Counter()
        for (shard, _), count in self.counts.items():
            found[shard] += count
        return dict(found.most_common())

    @property
    def lost_shards(self) -> int:
        """Shards of which nothing is known but that they are out of reach."""
        return len({shard for shard, reason in self.counts if reason in _LOST})

    def check(self, max_fraction: float, *, num_shards: int) -> None:
        """Raises DataError with the worst shards where more than `max_fraction` of at least 1,000 samples are unusable,
        or of the shards out of reach."""
        if self.samples < _MIN_SAMPLES:
            return
        if self.lost_shards > max_fraction * num_shards:
            raise DataError(
                f"{self.lost_shards} of {num_shards} shards are out of reach · {_listed(self.by_shard)} · restore "
                "them, or raise data.max_bad_fraction"
            )
        if self.unusable > max_fraction * self.samples:
            raise DataError(
                f"{self.unusable} of {self.samples} samples are unusable ({_listed(self.by_reason)}) · worst shards: "
                f"{_listed(self.by_shard)} · mend the shards (`diptych data check` lists all), or raise "
                "data.max_bad_fraction"
            )

    def summary(self) -> str:
        """One line: how many, why, and where most."""
        if not self.unusable:
            return "none"
        return f"{self.unusable} of {self.samples} ({_listed(self.by_reason)}) worst shards: {_listed(self.by_shard)}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        shards: dict[str, dict[str, int]] = {shard: {} for shard in self.by_shard}
        for (shard, reason), count in sorted(self.counts.items()):
            shards[shard][reason] = count
        return {
            "samples": self.samples,
            "unusable": self.unusable,
            "by_reason": self.by_reason,
            "by_shard": shards,
            "examples": self.examples,
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The reverse of `to_json`."""
        counts = {
            (shard, reason): count for shard, reasons in tree["by_shard"].items() for reason, count in reasons.items()
        }
        examples = {reason: list(places) for reason, places in tree["examples"].items()}
        return cls(tree["samples"], Counter(counts), examples)


def _listed(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{count} {name}" for name, count in list(counts.items())[:5])
    return shown + (f", and {len(counts) - 5} more" if len(counts) > 5 else "")
