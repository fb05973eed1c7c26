"""Robustness: zero-shot classification of pictures that were made worse.

Protocol: that of `zeroshot`, on the pictures as they are and in every kind and degree of `diptych_eval.corruptions`
(after arXiv:1903.12261, with differences stated there). A kind's figure is the mean over its degrees, `corrupted` the
mean over kinds, `relative` what that is of the figure on the pictures as they are (left out where this is 0). The
paper's mCE, which divides by AlexNet's errors, is not given. Ties count against the model.

A corrupted picture has 224 pixels: of a model that sees more, what that costs is part of the figures.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.errors import DataError
from diptych_eval import metrics
from diptych_eval.classes import ClassSet, check_labels, open_class_set
from diptych_eval.corruptions import KINDS, SEVERITIES, Corruption, Kind
from diptych_eval.embedder import EmbeddedSet, Embedder
from diptych_eval.tasks.family import Items, Outcome, Task
from diptych_eval.tasks.zeroshot import ZeroShot, against_classes


@dataclass(frozen=True)
class Robustness(Task, name="robustness"):
    """Zero-shot classification under corruptions."""

    root: str
    """As for zeroshot."""
    classes: str | None = None
    """As for zeroshot."""
    templates: str | None = None
    """As for zeroshot."""
    split: str = "test"
    """As for zeroshot."""
    corruptions: tuple[Kind, ...] = KINDS
    """Which kinds."""
    severities: tuple[int, ...] = SEVERITIES
    """Which degrees, 1 to 5."""

    def __post_init__(self) -> None:
        if not self.corruptions or len(set(self.corruptions)) < len(self.corruptions):
            raise ValueError("corruptions must be different kinds, at least one")
        if not self.severities or len(set(self.severities) & set(SEVERITIES)) < len(self.severities):
            raise ValueError(f"severities must be different numbers from 1 to 5, not {list(self.severities)}")

    @cached_property
    def _set(self) -> ClassSet:
        return open_class_set(self.root, self.classes, self.templates, self.split)

    def files(self) -> tuple[str, ...]:
        """See Task."""
        return ZeroShot(self.dataset, self.root, self.classes, self.templates, self.split).files()

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError for samples without label or of several, or labels beyond the class names."""
        clean = embedder.pictures(self._set.pictures)
        labels = self._labels(clean)
        columns = {"clean": self._right(embedder, clean, labels)}
        single: dict[str, float] = {}
        for kind in self.corruptions:
            degrees = []
            for severity in self.severities:
                worse = embedder.pictures(self._set.pictures, Corruption(kind, severity))
                degrees.append(self._right(embedder, worse, labels))
                single[f"{kind}/{severity}"] = float(degrees[-1].mean())
            columns[f"corrupted/{kind}"] = torch.stack(degrees).mean(0)
        columns["corrupted"] = torch.stack([columns[f"corrupted/{kind}"] for kind in self.corruptions]).mean(0)
        figures = {name: float(values.mean()) for name, values in columns.items()}
        if figures["clean"] > 0:
            figures["relative"] = figures["corrupted"] / figures["clean"]
        items = Items("pictures", tuple(item.key for item in clean.items), columns)
        notes: dict[str, object] = {"num_candidates": len(self._set.names), "top1_by_degree": single}
        return Outcome(figures, len(clean), (items,), notes=notes)

    def _labels(self, found: EmbeddedSet) -> list[tuple[int, ...]]:
        labels = [item.labels for item in found.items]
        check_labels(self.root, [item.key for item in found.items], labels, len(self._set.names))
        if several := next((item for item in found.items if len(item.labels) > 1), None):
            raise DataError(
                f"sample {several.key!r} has {len(several.labels)} labels · {self.root} · one each is needed"
            )
        return labels

    def _right(self, embedder: Embedder, found: EmbeddedSet, labels: list[tuple[int, ...]]) -> Float[Tensor, " N"]:
        """1 where the first guess is right."""
        pictures, classes = against_classes(embedder, found, self._set.names, self._set.templates)
        return (metrics.ranks(pictures.features, classes, labels) <= 1).double()
