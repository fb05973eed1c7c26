"""The family of evaluation tasks. A member is one file here: a frozen dataclass of its YAML keys and its protocol.

    @dataclass(frozen=True)
    class MyTask(Task, name="my_task"):
        root: str

        def files(self) -> tuple[str, ...]: return (self.root,)
        def run(self, embedder: Embedder) -> Outcome: ...

Tasks of other packages: an entry point in the group `diptych.tasks` that names the module
(`[project.entry-points."diptych.tasks"]` in its pyproject.toml).
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.config import Choice
from diptych_eval.embedder import CaptionedSet, EmbeddedSet, Embedder


@dataclass(frozen=True)
class Items:
    """A table with a row for each thing that was asked: pictures, or texts, or examples of a test."""

    kind: str
    """What the rows are, such as `pictures`."""
    keys: tuple[str, ...]
    """Names that stay the same from model to model."""
    columns: dict[str, Float[Tensor, " N"]]
    """Values of each row. Where a metric has the same name it is their mean: it gets an interval, and models can be
    compared row by row."""
    clusters: tuple[str, ...] = ()
    """Of each row the name of what it shares with others, such as their picture: rows of a cluster are no independent
    evidence, and are drawn together. None: every row is independent."""
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Texts of each row, such as what a model wrote."""

    @property
    def cluster_numbers(self) -> Int[Tensor, " N"] | None:
        """The clusters counted from 0; none where every row is independent."""
        if len(set(self.clusters)) == len(self.clusters):
            return None
        place: dict[str, int] = {}
        return torch.tensor([place.setdefault(name, len(place)) for name in self.clusters])


@dataclass(frozen=True)
class Matches:
    """Pictures and texts that were ranked against each other, for the report."""

    pictures: EmbeddedSet
    texts: tuple[str, ...]
    """Class names, or captions."""
    text_features: Float[Tensor, "M D"]
    right: tuple[tuple[int, ...], ...]
    """For each picture, its right texts."""
    image_ranks: Int[Tensor, " N"]
    """Of the best right text of each picture."""
    text_ranks: Int[Tensor, " M"] | None = None
    """Of the best right picture of each text; none where texts ask nothing."""


@dataclass(frozen=True)
class Descriptions:
    """What a model wrote about pictures, for the report."""

    pictures: CaptionedSet
    references: tuple[tuple[str, ...], ...]
    """What people wrote about each."""
    scores: Float[Tensor, " N"]
    """CIDEr-D of each."""


@dataclass(frozen=True)
class Outcome:
    """What a task found."""

    metrics: dict[str, float]
    num_items: int
    items: tuple[Items, ...] = ()
    matches: Matches | None = None
    notes: dict[str, object] = field(default_factory=dict)
    """What belongs to the protocol and is known only now, such as the number of candidates or a chosen setting."""
    descriptions: Descriptions | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95% bootstrap intervals of metrics that are no mean of a column."""


@dataclass(frozen=True)
class Task(Choice):
    """A protocol with its settings."""

    dataset: str
    """Name under which the result is kept, such as `openmoji/unseen`."""

    def files(self) -> tuple[str, ...]:
        """Files, folders and patterns that are read: a finished task is run again when they change."""
        raise NotImplementedError

    def run(self, embedder: Embedder) -> Outcome:
        """Measures a model. Every rank runs it, and finds the same.

        Raises:
            DataError: the set cannot be used; the message says what is wrong, where, and what to do.
        """
        raise NotImplementedError
