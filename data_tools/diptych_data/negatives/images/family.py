"""The family of sources of counter-images: pictures of which a negative is true.

To add one, a generator for instance: a file here with `class Mine(CounterImages, name="mine")`, a frozen dataclass
whose fields are its settings and whose `open` returns an object with `find`. It travels to the processes that write.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

from diptych.config import Choice, discover
from diptych_data.negatives.candidate import Negative


class Counterparts(Protocol):
    """An opened source."""

    def find(self, key: str, negatives: Sequence[Negative]) -> Iterator[tuple[int | None, bytes, str]]:
        """Pictures for a sample: which of its negatives one shows (None: nobody knows), its bytes, its extension.

        The same for the same arguments, whoever calls: what is written depends on it.
        """


class CounterImages(Choice):
    """Where counter-images come from."""

    @abstractmethod
    def open(self, shards: Sequence[str]) -> Counterparts:
        """Makes ready, once. Raises DataError where the source cannot be used."""


def find_sources() -> None:
    """Makes the sources of this folder known."""
    discover(__package__)
