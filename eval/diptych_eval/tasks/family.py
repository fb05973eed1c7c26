"""The family of evaluation tasks. A member is one file here: a frozen dataclass of its YAML keys and its protocol.

@dataclass(frozen=True)
class MyTask(Task, name="my_task"):
    def run(self, encoder, split) -> Outcome: ...
"""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from diptych.config import Choice
from diptych_eval.embed import EmbeddedSplit
from diptych_eval.encoder import Encoder


@dataclass(frozen=True)
class Prediction:
    """What the model thought of one anchor."""

    anchor: int
    """Position of a picture (or text) in the set."""
    ranked: tuple[tuple[int, float], ...]
    """The best candidates with their scores, best first."""
    rank: int
    """Rank of the best right candidate."""


@dataclass(frozen=True)
class Outcome:
    """The figures of a task and what the report draws from."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    num_items: int
    texts: tuple[str, ...]
    """The text candidates: class names, or captions."""
    text_features: Float[Tensor, "M D"]
    image_predictions: tuple[Prediction, ...]
    """Pictures as anchors, texts as candidates."""
    text_predictions: tuple[Prediction, ...] = ()
    """Texts as anchors, pictures as candidates."""
    right: tuple[tuple[int, ...], ...] = field(default=())
    """For each picture, its right texts."""


@dataclass(frozen=True)
class Task(Choice):
    """A protocol with its settings."""

    dataset: str
    """Name under which the result is kept, such as `openmoji/unseen`."""

    def shards(self) -> str:
        """The pictures that are embedded."""
        raise NotImplementedError

    def run(self, encoder: Encoder, split: EmbeddedSplit) -> Outcome:
        """Measures an embedded set."""
        raise NotImplementedError
