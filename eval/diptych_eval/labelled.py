"""Pictures of known classes in two parts: one to learn from, one to measure on.

ROOT/train/, ROOT/test/    shards whose samples have a `.cls` member (clip-benchmark's layout), or a folder per class
ROOT/classnames.txt        optional, beside shards: a label beyond it is an error

A class is known by its folder's name, or by the number in `.cls`: so both parts mean the same class, whatever else
they hold. Candidates are the classes that have pictures to learn from.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.errors import DataError
from diptych_eval import metrics
from diptych_eval.classes import CLASS_FILE, check_labels, lines
from diptych_eval.embedder import Embedder
from diptych_eval.pictures import Pictures, ShardPictures, class_folders
from diptych_eval.reading import Item
from diptych_eval.tasks.family import Items, Task


@dataclass(frozen=True)
class Labelled:
    """One part, as a model sees it."""

    features: Float[Tensor, "N D"]
    labels: Int[Tensor, " N"]
    """Places in `classes`."""
    keys: tuple[str, ...]
    classes: tuple[str, ...]
    where: str
    """For messages."""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, rows: Int[Tensor, " n"]) -> "Labelled":
        """Some of the pictures, of the same classes."""
        keys = tuple(self.keys[row] for row in rows.tolist())
        return Labelled(self.features[rows], self.labels[rows], keys, self.classes, self.where)


@dataclass(frozen=True)
class Part:
    """One part's pictures before a model has seen them."""

    pictures: Pictures
    folders: tuple[str, ...] | None
    """Label → class, where classes are folders."""
    names: Path | None
    """classnames.txt, where labels must be within it."""

    @classmethod
    def open(cls, root: str, name: str) -> "Part":
        """Raises DataError where there is no such folder, or nothing in it."""
        folder = Path(root) / name
        if not folder.is_dir():
            raise DataError(f"no folder {name!r} · {root} · put shards or a folder per class there, or name another")
        if any(folder.glob("*.tar")):
            names = Path(root) / CLASS_FILE
            return cls(ShardPictures(str(folder)), None, names if names.is_file() else None)
        found = class_folders(folder)
        return cls(found.pictures, found.names, None)

    @property
    def files(self) -> tuple[str, ...]:
        """What is read."""
        return (*self.pictures.files, *((str(self.names),) if self.names is not None else ()))

    def classes_of(self, items: tuple[Item, ...]) -> list[str]:
        """Each picture's class. Raises DataError where it has none, or several, or one without a name."""
        if wrong := next((item for item in items if len(item.labels) != 1), None):
            said = f"{len(wrong.labels)} labels" if wrong.labels else "no label"
            raise DataError(f"{said} of sample {wrong.key!r} · {self.pictures.where} · each picture needs one")
        if self.names is not None:
            labels = [item.labels for item in items]
            check_labels(self.pictures.where, [item.key for item in items], labels, len(lines(self.names)))
        return [str(item.labels[0]) if self.folders is None else self.folders[item.labels[0]] for item in items]


@dataclass(frozen=True)
class Parts:
    """Both."""

    train: Part
    test: Part

    @classmethod
    def open(cls, root: str, train: str, test: str) -> "Parts":
        """Raises DataError where one is missing."""
        return cls(Part.open(root, train), Part.open(root, test))

    @property
    def files(self) -> tuple[str, ...]:
        """What is read."""
        return (*self.train.files, *self.test.files)

    def embed(self, embedder: Embedder) -> tuple[Labelled, Labelled]:
        """What is learned from, and what is measured.

        Raises:
            DataError: a label is missing or wrong, there is one class only, or a class of the test has no pictures to
                learn from.
        """
        found = [embedder.pictures(part.pictures) for part in (self.train, self.test)]
        named = [part.classes_of(one.items) for part, one in zip((self.train, self.test), found, strict=True)]
        where = self.train.pictures.where
        classes = tuple(sorted(set(named[0]), key=lambda name: (int(name) if name.isdecimal() else -1, name)))
        if len(classes) < 2:
            raise DataError(f"one class only ({classes[0]!r}) · {where} · there must be two to tell apart")
        place = {name: number for number, name in enumerate(classes)}
        if unknown := sorted(set(named[1]) - set(classes)):
            raise DataError(
                f"{len(unknown)} classes of the test have no pictures to learn from ({unknown[0]!r}) · {where} · "
                "both parts must be of the same classes"
            )
        train, test = (
            Labelled(
                one.features,
                torch.tensor([place[name] for name in names]),
                tuple(item.key for item in one.items),
                classes,
                one.pictures.where,
            )
            for one, names in zip(found, named, strict=True)
        )
        return train, test


@dataclass(frozen=True)
class LabelledTask(Task):
    """A task that learns from one part of a set and measures on the other."""

    root: str
    """Folder with a part to learn from and a part to be measured on, each shards with `.cls` members or a folder per
    class."""
    train: str = "train"
    """The first part: a folder in root, or a path."""
    test: str = "test"
    """The second part."""

    @cached_property
    def _parts(self) -> Parts:
        return Parts.open(self.root, self.train, self.test)

    def files(self) -> tuple[str, ...]:
        """See Task."""
        return self._parts.files

    def embed(self, embedder: Embedder) -> tuple[Labelled, Labelled]:
        """See Parts."""
        return self._parts.embed(embedder)


def judged(test: Labelled, ranks: Int[Tensor, " N"]) -> tuple[dict[str, float], Items]:
    """Top-1 and top-5 accuracy and the mean over classes, from the rank of each picture's class."""
    columns = {f"top{k}": (ranks <= k).double() for k in (1, 5)}
    figures = {name: float(values.mean()) for name, values in columns.items()}
    figures["mean_per_class"] = metrics.mean_per_class(columns["top1"], test.labels)
    return figures, Items("pictures", test.keys, columns)
