"""Throughput and where the time goes, between two logged steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Throughput:
    """Counts samples and seconds since the last reading, and the share of them spent waiting for data."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._samples = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count(self, samples: int) -> None:
        """Samples of all ranks consumed by one step."""
        self._samples += samples

    def read(self) -> dict[str, float]:
        """The figures since the last reading; starts the next one."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        figures = {"train/samples_per_second": self._samples / seconds, "data/wait_share": self._waited / seconds}
        self._restart()
        return figures
