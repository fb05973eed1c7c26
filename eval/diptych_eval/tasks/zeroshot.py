"""Zero-shot classification: the class whose prompts lie nearest to the picture.

Protocol: arXiv:2103.00020, section 3.1.4. A class's feature is the mean of its prompts' unit-norm features, brought to
unit norm again; a model tuned with prompts of classes reads the names by these. Candidates are all class names, also
those that no picture of the set shows. Confidence, for calibration, is the softmax over classes at the model's own
logit_scale.

Where pictures have several labels, the figure is the mean over classes of the average precision (mAP).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych_eval import metrics
from diptych_eval.classes import CLASS_FILE, TEMPLATE_FILE, ClassSet, check_labels, open_class_set
from diptych_eval.embedder import EmbeddedSet, Embedder
from diptych_eval.tasks.family import Items, Matches, Outcome, Task


@dataclass(frozen=True)
class ZeroShot(Task, name="zeroshot"):
    """Zero-shot classification."""

    root: str
    """Folder in clip-benchmark's layout (test/*.tar, classnames.txt, zeroshot_classification_templates.txt), a folder
    per class, or shards with `.cls` members."""
    classes: str | None = None
    """`imagenet`, or a file with one class name per line; none: classnames.txt of the folder, or its folders' names.
    With `imagenet`, folders of ImageNet-A, R, Sketch, V2 and ObjectNet are understood too."""
    templates: str | None = None
    """`imagenet` (80 prompts), `imagenet_simple` (7), `name` (the bare name), or a file of prompts with `{c}`; none:
    that of the folder, or else the bare name."""
    split: str = "test"
    """Part of a folder in clip-benchmark's layout."""

    @cached_property
    def _set(self) -> ClassSet:
        return open_class_set(self.root, self.classes, self.templates, self.split)

    def files(self) -> tuple[str, ...]:
        """See Task."""
        texts = [Path(name) for name in (self.classes, self.templates) if name is not None]
        texts += [Path(self.root) / name for name in (CLASS_FILE, TEMPLATE_FILE)]
        return (*self._set.pictures.files, *(str(path) for path in texts if path.is_file()))

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError for samples without label or labels beyond the class names."""
        names = self._set.names
        found = embedder.pictures(self._set.pictures)
        keys = tuple(item.key for item in found.items)
        labels = [item.labels for item in found.items]
        check_labels(self.root, keys, labels, len(names))
        found, classes = against_classes(embedder, found, names, self._set.templates)
        if any(len(some) > 1 for some in labels):
            return _multi_label(found, classes, labels)
        return _single_label(found, names, classes, labels, embedder.encoder.logit_scale)


def against_classes(
    embedder: Embedder, found: EmbeddedSet, names: tuple[str, ...], templates: tuple[str, ...]
) -> tuple[EmbeddedSet, Float[Tensor, "C K"]]:
    """Pictures and classes, to be compared by their products: one unit-norm feature per class from an ensemble of
    prompts, or by the model's own prompts of classes where it has some."""
    own = embedder.encoder.read_classes(found.features, names)
    if own is not None:
        return replace(found, features=own[0]), own[1]
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    features = embedder.texts(prompts).view(len(names), len(templates), -1)
    return found, F.normalize(features.mean(1), dim=-1)


def _single_label(
    found: EmbeddedSet,
    names: tuple[str, ...],
    classes: Float[Tensor, "C D"],
    labels: list[tuple[int, ...]],
    logit_scale: float,
) -> Outcome:
    label = torch.tensor(labels)[:, 0]
    ranks = metrics.ranks(found.features, classes, labels)
    columns = {f"top{k}": (ranks <= k).double() for k in (1, 5)}
    columns["confidence"], guess = _first_guesses(found.features, classes, logit_scale)
    bins = metrics.calibration(columns["confidence"], (guess == label).double())
    figures = {
        "top1": metrics.recall_at(ranks, 1),
        "top5": metrics.recall_at(ranks, 5),
        "mean_per_class": metrics.mean_per_class(columns["top1"], label),
        "calibration_error": bins.error,
    }
    return Outcome(
        figures,
        len(found),
        (Items("pictures", tuple(item.key for item in found.items), columns),),
        Matches(found, names, classes, tuple(labels), ranks),
        {"num_candidates": len(names), "calibration": bins.to_json()},
    )


def _first_guesses(
    features: Float[Tensor, "N D"], classes: Float[Tensor, "C D"], logit_scale: float
) -> tuple[Tensor, Tensor]:
    """Confidence and class of each picture's first guess."""
    parts = [(logit_scale * rows @ classes.T).softmax(1).max(1) for rows in features.split(1024)]
    return torch.cat([part.values for part in parts]).double(), torch.cat([part.indices for part in parts])


def _multi_label(found: EmbeddedSet, classes: Float[Tensor, "C D"], labels: list[tuple[int, ...]]) -> Outcome:
    truth = torch.zeros(len(found), len(classes), dtype=torch.bool)
    for row, some in enumerate(labels):
        truth[row, list(some)] = True
    precision = metrics.average_precision(found.features @ classes.T, truth)
    shown = precision[~precision.isnan()]
    notes: dict[str, object] = {"num_candidates": len(classes), "classes_without_pictures": len(precision) - len(shown)}
    return Outcome({"mean_average_precision": float(shown.mean())}, len(found), notes=notes)
