"""Unseen pairs: attributes and objects that were trained in some compositions, measured on all of them.

Protocol: arXiv:2204.03574, section 5 (that of Purushwalkam et al., ICCV 2019). Candidates are the set's classes (closed
world; name all possible pairs there for the open one). The bias for untrained candidates goes from -inf to inf, since a
model that was trained on some says those too often: AUC is the area under the accuracy on untrained pairs over that on
trained ones, beside the best harmonic mean of the two and each at its best.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from diptych.errors import DataError
from diptych_eval.classes import CLASS_FILE, ClassSet, check_labels, lines, open_class_set
from diptych_eval.embedder import Embedder
from diptych_eval.tasks.family import Outcome, Task
from diptych_eval.tasks.zeroshot import against_classes
from diptych_eval.unseen import bias_sweep


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

    @cached_property
    def _set(self) -> ClassSet:
        return open_class_set(self.root, self.classes, self.templates, self.split)

    def files(self) -> tuple[str, ...]:
        """See Task."""
        texts = [Path(name) for name in (self.trained, self.classes, self.templates) if name is not None]
        texts.append(Path(self.root) / CLASS_FILE)
        return (*self._set.pictures.files, *(str(path) for path in texts if path.is_file()))

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError where nothing was trained, everything was, or a name is no class."""
        names = self._set.names
        trained = {name.strip() for name in lines(Path(self.trained))}
        if strange := sorted(trained - set(names)):
            raise DataError(f"{strange[0]!r} is no class of the set · {self.trained} · write it as there")
        found = embedder.pictures(self._set.pictures)
        labels = [item.labels for item in found.items]
        check_labels(self.root, [item.key for item in found.items], labels, len(names))
        pictures, classes = against_classes(embedder, found, names, self._set.templates)
        is_trained = torch.tensor([name in trained for name in names])
        label = torch.tensor([some[0] for some in labels])
        try:
            sweep = bias_sweep(pictures.features @ classes.T, label, is_trained)
        except ValueError as error:
            raise DataError(f"{error} · {self.root} · check {self.trained}") from error
        figures = {
            "auc": sweep.area,
            "harmonic_mean": sweep.harmonic_mean,
            "trained": float(sweep.trained[0]),
            "untrained": float(sweep.untrained[-1]),
        }
        return Outcome(figures, len(found), notes={"num_candidates": len(names), "num_trained": int(is_trained.sum())})
