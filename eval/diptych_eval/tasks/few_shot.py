"""Few shots: the linear probe learned from k pictures of each class, for several k and several draws.

The classifier is that of `linear_probe`, at its optimum, but for a strength that is set: with so few pictures there are
none to choose it on, and to take more of them for that would make more than k shots of it. A draw depends on the seed,
the class and the keys alone; one of fewer shots is a part of one of more.

A figure is the mean over draws, its interval the bootstrap over draws: it says what the choice of pictures makes, not
what that of the test pictures does. Equal scores count against the model.
"""

from dataclasses import dataclass

import torch

from diptych.errors import DataError
from diptych_eval.embedder import Embedder
from diptych_eval.labelled import Labelled, LabelledTask, judged
from diptych_eval.probe import Problem, shuffled_classes
from diptych_eval.tasks.family import Items, Outcome


@dataclass(frozen=True)
class FewShot(LabelledTask, name="few_shot"):
    """Linear probe with few pictures per class."""

    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Pictures per class."""
    draws: int = 10
    """For each number of shots; seeds are 0, 1, 2, …"""
    strength: float = 0.03
    """Of the penalty, greater than 0."""

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1 or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"shots must be different numbers of at least 1, not {list(self.shots)}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, not {self.draws}")
        if self.strength <= 0:
            raise ValueError(f"strength must be greater than 0, not {self.strength}")

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError for labels that do not fit, and for a class with fewer pictures than shots."""
        train, test = self.embed(embedder)
        _check_sizes(train, max(self.shots))
        columns: dict[str, list[float]] = {}
        for seed in range(self.draws):
            order = shuffled_classes(train, seed, "shots")
            for shots in self.shots:
                drawn = train.rows(torch.cat([rows[:shots] for rows in order]))
                figures, _ = judged(test, Problem(drawn).solve(self.strength).ranks(test))
                for name, value in figures.items():
                    columns.setdefault(f"shots_{shots}/{name}", []).append(value)
        tables = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
        items = Items("draws", tuple(str(seed) for seed in range(self.draws)), tables)
        means = {name: float(values.mean()) for name, values in tables.items()}
        return Outcome(means, len(test), (items,), notes={"num_candidates": len(train.classes)})


def _check_sizes(train: Labelled, shots: int) -> None:
    """Raises DataError where a class cannot give that many."""
    sizes = torch.bincount(train.labels, minlength=len(train.classes))
    if small := (sizes < shots).nonzero()[:, 0].tolist():
        raise DataError(
            f"{shots} shots, but {len(small):,} classes have fewer pictures ({train.classes[small[0]]!r}: "
            f"{int(sizes[small[0]])}) · {train.where} · leave out shots: {shots}"
        )
