"""Composition: is a caption told from one of the same words, or of nearly the same?

One picture, one true caption and foils: right where the true one scores higher than every foil.
Two pictures with a caption each (Winoground, arXiv:2204.03162): `text`, each picture prefers its own caption; `image`,
each caption prefers its own picture (MMVP-VLM's figure, arXiv:2401.06209); `group`, both. A tie is wrong.

Accuracy is given over all examples, for each group, and as the mean over groups (ARO's figure).
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.data.shards import list_shards
from diptych.errors import DataError, one_line
from diptych_eval.embedder import EmbeddedSet, Embedder
from diptych_eval.foils import Example, pictures_of, read_examples
from diptych_eval.pictures import FilePictures, ShardPictures
from diptych_eval.tasks.family import Items, Outcome, Task


@dataclass(frozen=True)
class Composition(Task, name="composition"):
    """True captions against foils."""

    path: str
    """Folder of the pictures that `annotations` names; without it, shards whose samples have both columns."""
    annotations: Path | None = None
    """A file of SugarCrepe, ARO (relation, attribution, and the order sets as its code makes them), VALSE, What'sUp,
    Winoground (examples.jsonl) or MMVP-VLM (Questions.csv)."""
    true_column: str = "txt"
    """In shards: the column of the caption."""
    foil_column: str = "hard"
    """In shards: the column of its foils; samples without any are passed over."""
    group_column: str = "group"
    """In shards: the column of `meta` that says which kind of foils they are."""
    each: Literal["picture", "negative"] = "picture"
    """In shards: `negative`, each text that `diptych data negatives` wrote is an example of its own, beside the caption
    that it was made from, and its kind is the group; the columns are not looked at."""
    blind: Path | None = None
    """What `diptych data blind --json` printed of the same shards: how often texts alone give the foils of a kind away
    stands beside as `blind/KIND`."""

    @cached_property
    def _examples(self) -> list[Example]:
        return read_examples(self.annotations, Path(self.path)) if self.annotations is not None else []

    @cached_property
    def _annotated(self) -> tuple[FilePictures, list[list[int]]]:
        return pictures_of(Path(str(self.annotations)), self._examples)

    def files(self) -> tuple[str, ...]:
        """See Task."""
        if self.annotations is None:
            return (*list_shards(self.path), *((str(self.blind),) if self.blind is not None else ()))
        return (str(self.annotations), *self._annotated[0].files)

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError where a picture cannot be read, or nothing has foils."""
        if self.annotations is None:
            return self._run_on_shards(embedder)
        pictures, places = self._annotated
        found = embedder.pictures(pictures)
        if found.faults.unusable:
            raise DataError(f"pictures cannot be read ({found.faults.summary()}) · {self.annotations} · copy them anew")
        texts = embedder.texts([text for one in self._examples for text in one.captions])
        captions = texts.split([len(one.captions) for one in self._examples])
        pairs = [(found.features[place], some) for place, some in zip(places, captions, strict=True)]
        keys = [one.key for one in self._examples]
        groups = [one.group for one in self._examples]
        if len(self._examples[0].pictures) == 2:
            right = torch.tensor([_prefers(images @ some.T) for images, some in pairs]).double()
            columns = {name: right[:, place] for place, name in enumerate(("text", "image", "group"))}
        else:
            columns = {"accuracy": torch.tensor([_is_first(images[0] @ some.T) for images, some in pairs]).double()}
        # Examples of one picture are not independent; of two, the first stands for both.
        return _outcome(keys, groups, columns, tuple(one.pictures[0].key for one in self._examples))

    def _run_on_negatives(self, embedder: Embedder) -> Outcome:
        found = embedder.pictures(ShardPictures(self.path))
        wrong = [(row, one) for row, item in enumerate(found.items) for one in item.negatives]
        if not wrong:
            raise DataError(f"no sample has negatives · {self.path} · diptych data negatives writes them")
        texts = embedder.texts([text for _, one in wrong for text in (one.of, one.text)]).unflatten(0, (-1, 2))
        rows = [row for row, _ in wrong]
        right = torch.tensor([_is_first(found.features[row] @ pair.T) for row, pair in zip(rows, texts, strict=True)])
        keys = [f"{found.items[row].key}: {one.text}" for row, one in wrong]
        clusters = tuple(found.items[row].key for row in rows)
        outcome = _outcome(keys, [one.kind for _, one in wrong], {"accuracy": right.double()}, clusters)
        return replace(outcome, metrics=outcome.metrics | self._blind())

    def _blind(self) -> dict[str, float]:
        if self.blind is None:
            return {}
        try:
            kinds = json.loads(self.blind.read_text(encoding="utf-8"))["kinds"]
            return {f"blind/{kind}": float(one["value"]) for kind, one in kinds.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"not what `diptych data blind --json` prints ({one_line(error)}) · {self.blind} · make it again"
            ) from error

    def _run_on_shards(self, embedder: Embedder) -> Outcome:
        if self.each == "negative":
            return self._run_on_negatives(embedder)
        found = embedder.pictures(ShardPictures(self.path))
        rows = [row for row in range(len(found)) if found.items[row].captions.get(self.foil_column)]
        if not rows:
            raise DataError(f"no sample has foils in {self.foil_column!r} · {self.path} · correct foil_column")
        captions = [self._captions(found, row) for row in rows]
        texts = embedder.texts([text for some in captions for text in some]).split([len(some) for some in captions])
        right = [_is_first(found.features[row] @ some.T) for row, some in zip(rows, texts, strict=True)]
        groups = [found.items[row].meta.get(self.group_column, "") for row in rows]
        return _outcome([found.items[row].key for row in rows], groups, {"accuracy": torch.tensor(right).double()})

    def _captions(self, found: EmbeddedSet, row: int) -> tuple[str, ...]:
        item = found.items[row]
        true = item.captions.get(self.true_column)
        if not true:
            raise DataError(f"sample {item.key!r} has no {self.true_column!r} · {self.path} · correct true_column")
        return (true[0], *item.captions[self.foil_column])


def _is_first(scores: Float[Tensor, " K"]) -> bool:
    """Whether the first scores higher than all others."""
    return bool((scores[0] > scores[1:]).all())


def _prefers(scores: Float[Tensor, "2 2"]) -> tuple[bool, bool, bool]:
    """Winoground's three figures; scores are pictures × captions."""
    own, other = scores.diagonal(), scores.flip(1).diagonal()
    text = bool((own > other).all())  # picture 0 with caption 1, picture 1 with caption 0
    image = bool((own > other.flip(0)).all())
    return text, image, text and image


def _outcome(keys: list[str], groups: list[str], columns: dict[str, Tensor], clusters: tuple[str, ...] = ()) -> Outcome:
    figures = {name: float(values.mean()) for name, values in columns.items()}
    names = sorted(set(groups) - {""})
    for name, values in columns.items():
        of_groups = {group: float(values[[one == group for one in groups]].mean()) for group in names}
        if len(names) > 1:
            figures |= {f"{name}/{group}": value for group, value in of_groups.items()}
            figures[f"{name}/mean_of_groups"] = sum(of_groups.values()) / len(of_groups)
    return Outcome(figures, len(keys), (Items("examples", tuple(keys), columns, clusters),))
