"""Unseen pairs: attributes and objects that were trained in some compositions, measured on all of them.

Protocol: arXiv:2204.03574, section 5 (that of Purushwalkam et al., ICCV 2019). Candidates are the set's classes (closed
world), or all pairs of an attribute and an object (open world), of which those may be left out that are little like
what was trained. The bias for untrained candidates goes from -inf to inf, since a model that was trained on some says
those too often: AUC is the area under the accuracy on untrained pairs over that on trained ones, beside the best
harmonic mean of the two and each at its best.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from diptych.config import Config
from diptych.errors import DataError
from diptych.models.prompts.compositional import Pairs
from diptych_eval.classes import CLASS_FILE, ClassSet, check_labels, lines, open_class_set
from diptych_eval.embedder import Embedder
from diptych_eval.tasks.family import Outcome, Task
from diptych_eval.tasks.zeroshot import against_classes
from diptych_eval.unseen import Asked, choose_threshold, feasibility


@dataclass(frozen=True)
class OpenWorld(Config):
    """All pairs are candidates, or those that are like what was trained."""

    attributes: str
    """File with all attributes, one per line."""
    objects: str
    """File with all objects, one per line."""
    pattern: str = "{attribute} {object}"
    """How the name of a class is made of the two."""
    threshold: float | None = None
    """Untrained pairs of a lower feasibility (`diptych_eval.unseen`), in [-1, 1], are no candidates."""
    held_out: str | None = None
    """Part of the root on which the threshold is chosen, such as `val`; never the one that is measured. Neither: all
    pairs are candidates."""

    def __post_init__(self) -> None:
        if any(self.pattern.count(part) != 1 for part in ("{attribute}", "{object}")):
            raise ValueError(f"pattern must hold {{attribute}} and {{object}} once each, not {self.pattern!r}")
        if self.threshold is not None and (self.held_out is not None or not -1 <= self.threshold <= 1):
            raise ValueError("threshold must lie in [-1, 1], or be chosen on held_out")

    @cached_property
    def pairs(self) -> Pairs:
        """The parts."""
        attributes, objects = (
            tuple(line.strip() for line in lines(Path(name))) for name in (self.attributes, self.objects)
        )
        return Pairs(attributes, objects, self.pattern)


@dataclass(frozen=True)
class UnseenPairs(Task, name="unseen_pairs"):
    """Compositions of which some were trained."""

    root: str
    """As in the task `zeroshot`."""
    trained: str
    """File with the names of the classes that were trained, one per line."""
    classes: str | None = None
    """As in the task `zeroshot`."""
    templates: str | None = None
    """As in the task `zeroshot`; a model tuned with prompts of classes reads these by its own."""
    split: str = "test"
    """As in the task `zeroshot`."""
    open_world: OpenWorld | None = None
    """Which pairs are candidates beside the set's classes; none: no others (closed world)."""

    @cached_property
    def _set(self) -> ClassSet:
        return open_class_set(self.root, self.classes, self.templates, self.split)

    @cached_property
    def _held_out(self) -> ClassSet | None:
        """Raises DataError where it is what is measured."""
        if self.open_world is None or self.open_world.held_out is None:
            return None
        found = open_class_set(self.root, self.classes, self.templates, self.open_world.held_out)
        if set(found.pictures.files) & set(self._set.pictures.files) or found.names != self._set.names:
            raise DataError(
                f"{self.open_world.held_out!r} is no other part of the same classes · {self.root} · "
                "name one beside the part that is measured, or give threshold"
            )
        return found

    def files(self) -> tuple[str, ...]:
        """See Task."""
        given = [self.trained, self.classes, self.templates]
        if self.open_world is not None:
            given += [self.open_world.attributes, self.open_world.objects]
        texts = [*(Path(name) for name in given if name is not None), Path(self.root) / CLASS_FILE]
        held = self._held_out.pictures.files if self._held_out is not None else ()
        return (*self._set.pictures.files, *held, *(str(path) for path in texts if path.is_file()))

    @cached_property
    def _candidates(self) -> tuple[str, ...]:
        """Names, the set's classes first. Raises ConfigError where one of these is no pair."""
        if self.open_world is None:
            return self._set.names
        pairs = self.open_world.pairs
        pairs.indices(self._set.names)
        return tuple(dict.fromkeys((*self._set.names, *pairs.numbers)))

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError where nothing was trained, everything was, or a name is no class."""
        names = self._candidates
        trained = {name.strip() for name in lines(Path(self.trained))}
        if strange := sorted(trained - set(names)):
            raise DataError(f"{strange[0]!r} is no class of the set · {self.trained} · write it as there")
        is_trained = torch.tensor([name in trained for name in names])
        asked = self._asked(embedder, self._set, is_trained)
        notes: dict[str, object] = {"num_candidates": len(names), "num_trained": int(is_trained.sum())}
        try:
            is_candidate, threshold = self._kept(embedder, is_trained)
            sweep = asked.sweep(is_candidate)
        except ValueError as error:
            raise DataError(f"{error} · {self.root} · check {self.trained}") from error
        if is_candidate is not None:
            notes |= {"num_candidates": int(is_candidate.sum()), "num_pairs": len(names), "threshold": threshold}
        figures = {
            "auc": sweep.area,
            "harmonic_mean": sweep.harmonic_mean,
            "trained": float(sweep.trained[0]),
            "untrained": float(sweep.untrained[-1]),
        }
        return Outcome(figures, len(asked.labels), notes=notes)

    def _asked(self, embedder: Embedder, part: ClassSet, is_trained: torch.Tensor) -> Asked:
        found = embedder.pictures(part.pictures)
        labels = [item.labels for item in found.items]
        check_labels(self.root, [item.key for item in found.items], labels, len(part.names))
        pictures, classes = against_classes(embedder, found, self._candidates, part.templates)
        return Asked(pictures.features, classes, torch.tensor([some[0] for some in labels]), is_trained)

    def _kept(self, embedder: Embedder, is_trained: torch.Tensor) -> tuple[torch.Tensor | None, float | None]:
        """Which pairs are candidates, and the threshold; none: all are."""
        world = self.open_world
        if world is None or (world.threshold, world.held_out) == (None, None):
            return None, None
        pairs = torch.tensor(world.pairs.indices(self._candidates))
        words = [embedder.texts(part) for part in (world.pairs.attributes, world.pairs.objects)]
        feasible = feasibility(pairs, is_trained, *words)
        if self._held_out is not None:
            threshold = choose_threshold(self._asked(embedder, self._held_out, is_trained), feasible)
        else:
            assert world.threshold is not None, "one of the two is given"
            threshold = world.threshold
        return feasible >= threshold, threshold
