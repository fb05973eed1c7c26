"""The family of language models that write negatives: a file here with `class Mine(Writer, name="mine")`."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diptych.config import Choice, discover


@dataclass(frozen=True)
class Raw:
    """What a model wrote, as it wrote it."""

    text: str
    type: str
    """What was to be changed; `paraphrase`: nothing, it is to be true."""


class Writer(Choice):
    """A language model and what it is asked for."""

    @abstractmethod
    def load(self) -> Callable[[Sequence[str], int], list[list[Raw]]]:
        """Captions and a seed → what the model makes of each.

        Raises:
            ConfigError: the model or its prompts cannot be had.
        """


def find_writers() -> None:
    """Makes the writers of this folder known."""
    discover(__package__)
