"""The few pictures that are learned from: drawn by seed, and written as a shard of their own."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from diptych.data import index
from diptych.errors import DataError
from diptych_eval.classes import ClassSet, check_labels, open_class_set
from diptych_eval.embedder import EmbeddedSet, Embedder
from diptych_eval.labelled import Labelled
from diptych_eval.probe import shuffled_classes


@dataclass(frozen=True)
class Part:
    """Pictures of one part with the classes they are of."""

    set: ClassSet
    found: EmbeddedSet
    labels: Int[Tensor, " N"]
    content: str
    """Differs where the pictures or their labels do."""

    @classmethod
    def open(cls, embedder: Embedder, root: str, split: str, classes: str | None, templates: str | None) -> "Part":
        """Raises DataError for samples without a label, with several, or with one beyond the names."""
        folder = str(Path(root) / split) if not any((Path(root) / split).glob("*.tar")) else root
        chosen = open_class_set(folder, classes, templates, split)
        found = embedder.pictures(chosen.pictures)
        labels = [item.labels for item in found.items]
        check_labels(chosen.pictures.where, [item.key for item in found.items], labels, len(chosen.names))
        content = f"{embedder.digest(chosen.pictures.files)}-{chosen.pictures.variant}"
        return cls(chosen, found, torch.tensor([some[0] for some in labels]), content)

    def of_classes(self, first: int, last: int) -> Labelled:
        """Its pictures of the classes `first` to `last - 1`, numbered from 0."""
        rows = ((self.labels >= first) & (self.labels < last)).nonzero()[:, 0]
        return Labelled(
            self.found.features[rows],
            self.labels[rows] - first,
            tuple(self.found.items[row].key for row in rows.tolist()),
            self.set.names[first:last],
            self.set.pictures.where,
        )


def draw(train: Labelled, shots: int, seed: int) -> Int[Tensor, " n"]:
    """Rows of so many pictures of each class; a draw of fewer is a part of one of more.

    Raises:
        DataError: a class has fewer.
    """
    order = shuffled_classes(train, seed, "shots")
    if small := [name for name, rows in zip(train.classes, order, strict=True) if len(rows) < shots]:
        sizes = dict(zip(train.classes, map(len, order), strict=True))
        raise DataError(
            f"{shots} shots, but {len(small):,} classes have fewer pictures ({small[0]!r}: {sizes[small[0]]}) · "
            f"{train.where} · leave out shots: {shots}"
        )
    return torch.cat([rows[:shots] for rows in order])


def hold_out(part: Labelled, shots: int, seed: int, *, behind: int) -> Int[Tensor, " n"]:
    """Rows to choose on: so many of each class, or as many as there are, behind the first ones of its draw.

    Raises:
        DataError: nothing is left of a class.
    """
    order = [rows[behind:] for rows in shuffled_classes(part, seed, "shots")]
    if bare := [name for name, rows in zip(part.classes, order, strict=True) if not len(rows)]:
        raise DataError(
            f"nothing is left to choose tuned_share on ({len(bare):,} classes, {bare[0]!r} the first) · {part.where} · "
            "add a folder `val`, leave out the most shots, or give a number such as 0.5"
        )
    return torch.cat([rows[:shots] for rows in order])


def write(part: Part, drawn: Labelled, folder: Path) -> Path:
    """A shard of the drawn pictures: picture, .cls and, from the set's first template, .txt; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {item.key: item.number for item in part.found.items}
    with tarfile.open(folder / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (key, label) in enumerate(zip(drawn.keys, drawn.labels.tolist(), strict=True)):
            entry = part.set.pictures.read(entries[key])
            caption = part.set.templates[0].replace("{c}", drawn.classes[label])
            members = {_extension(entry.picture): entry.picture, "cls": str(label).encode(), "txt": caption.encode()}
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index.write(folder / "000000.tar", index.scan(folder / "000000.tar"))
    return folder


def _extension(picture: bytes) -> str:
    with Image.open(io.BytesIO(picture)) as opened:
        return {"JPEG": "jpg"}.get(opened.format or "", (opened.format or "png").lower())
