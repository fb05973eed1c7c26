"""Zero-shot classification: the class whose prompts lie nearest to the picture.

Protocol: arXiv:2103.00020, section 3.1.4. A class's feature is the mean of its prompts' unit-norm features, brought to
unit norm again. Candidates are all class names, also those that no picture of the set shows.

The set is a folder in clip-benchmark's layout: test/*.tar with .cls members, classnames.txt (line number = label),
zeroshot_classification_templates.txt (one prompt per line with `{c}`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych.errors import DataError
from diptych_eval import metrics
from diptych_eval.embed import EmbeddedSplit
from diptych_eval.encoder import Encoder
from diptych_eval.tasks.family import Outcome, Prediction, Task

_KEPT = 5


@dataclass(frozen=True)
class ZeroShot(Task, name="zeroshot"):
    """Zero-shot classification of a folder in clip-benchmark's layout."""

    root: str
    """Folder with test/, classnames.txt and zeroshot_classification_templates.txt."""

    def shards(self) -> str:
        """See Task."""
        return str(Path(self.root) / "test")

    def run(self, encoder: Encoder, split: EmbeddedSplit) -> Outcome:
        """See Task. Raises DataError for samples without label or labels beyond the class names."""
        names = _lines(Path(self.root) / "classnames.txt")
        templates = _lines(Path(self.root) / "zeroshot_classification_templates.txt")
        labels = _labels(split, len(names), self.root)
        classes = class_features(encoder, names, templates)
        ranks = metrics.ranks(split.features, classes, [(int(label),) for label in labels])
        top1 = (ranks <= 1).double()
        figures = {
            "top1": metrics.recall_at(ranks, 1),
            "top5": metrics.recall_at(ranks, 5),
            "mean_per_class": metrics.mean_per_class(top1, labels),
        }
        intervals = {f"top{k}": metrics.bootstrap_interval((ranks <= k).double()) for k in (1, 5)}
        best = (split.features @ classes.T).topk(min(_KEPT, len(names)))
        predictions = tuple(
            Prediction(i, tuple(zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)), int(ranks[i]))
            for i in range(len(split))
        )
        right = tuple((int(label),) for label in labels)
        return Outcome(figures, intervals, len(split), tuple(names), classes, predictions, right=right)


def class_features(encoder: Encoder, names: list[str], templates: list[str]) -> Float[Tensor, "C D"]:
    """One unit-norm feature per class from an ensemble of prompts."""
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    features = encoder.encode_text(prompts).view(len(names), len(templates), -1)
    return F.normalize(features.mean(1), dim=-1)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"not readable ({error}) · {path} · expected clip-benchmark's layout") from error
    if not lines:
        raise DataError(f"file is empty · {path} · write one entry per line")
    return lines


def _labels(split: EmbeddedSplit, num_classes: int, root: str) -> Tensor:
    for key, label in zip(split.keys, split.labels, strict=True):
        if label is None or not 0 <= label < num_classes:
            raise DataError(f"label {label} of sample {key!r} is not among the {num_classes} class names · {root}")
    return torch.tensor(split.labels)
