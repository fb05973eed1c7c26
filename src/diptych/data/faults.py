"""Samples that cannot be used: the reasons, the counters and the limit. Counted, never hidden."""

from collections import Counter

from diptych.errors import DataError

_MIN_SAMPLES = 1000
"""Fewer samples than this say nothing about a fraction."""


class UnusableSample(Exception):
    """Raised while a sample is prepared; `reason` is the name it is counted under (`undecodable`, `no_caption`, …)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class FaultCounter:
    """Counts unusable samples by reason and shard, and stops the run beyond a fraction."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._limit = max_bad_fraction
        self._samples = 0
        self.by_reason: Counter[str] = Counter()
        self.by_shard: Counter[str] = Counter()

    def add(self, good: int, bad: list[tuple[str, str]]) -> None:
        """Counts `good` usable samples and the (reason, shard) of each unusable one.

        Raises:
            DataError: the unusable share exceeds the limit.
        """
        self._samples += good + len(bad)
        self.by_reason.update(reason for reason, _ in bad)
        self.by_shard.update(shard for _, shard in bad)
        num_bad = self.by_reason.total()
        if self._samples >= _MIN_SAMPLES and num_bad > self._limit * self._samples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.by_reason.most_common(3))
            worst = ", ".join(f"{shard} ({count})" for shard, count in self.by_shard.most_common(3))
            raise DataError(
                f"{num_bad} of {self._samples} samples are unusable ({reasons}) · worst shards: {worst} · "
                "mend the shards or raise data.max_bad_fraction"
            )
