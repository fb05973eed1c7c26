"""Geometry: how pictures and texts lie on the unit sphere. No figure is good or bad by itself.

alignment               ‖picture − text‖² of what belongs together; a picture with several texts counts once
uniformity/…            how unevenly each side fills the sphere                  (arXiv:2005.10242)
modality_gap            distance between the centres of both sides               (arXiv:2203.02053)
effective_rank/…        in how many directions each side lies                    (Roy and Vetterli 2007)
tolerance               mean cosine of different pictures of a class             (arXiv:2012.09740)
hub_skewness/texts      skewness of N_10 over texts: in how many pictures' ten nearest texts a text is
never_found/texts       share of texts that are in none; both also for pictures  (Radovanovic et al., JMLR 11, 2010)
logit_scale             of the model

Equal texts are one text. Places that tie for the tenth are shared (`diptych_eval.neighbours`). Left out: tolerance
where no two pictures have the same class, hubs among ten candidates or fewer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych import geometry
from diptych.errors import DataError
from diptych_eval import metrics
from diptych_eval.embedder import EmbeddedSet, Embedder
from diptych_eval.neighbours import occurrences
from diptych_eval.tasks.family import Items, Matches, Outcome, Task

_PLACES = 10
_PAIRS = 65536


@dataclass(frozen=True)
class Geometry(Task, name="geometry"):
    """Diagnostics of the embedding."""

    of: Task
    """A retrieval or zeroshot task: its pictures with their captions, or with their classes."""

    def files(self) -> tuple[str, ...]:
        """See Task."""
        return self.of.files()

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError for a task that ranks no texts."""
        matches = self.of.run(embedder).matches
        if matches is None:
            raise DataError(
                f"{self.of.choice_name} ranks no texts for pictures · task geometry {self.dataset} · "
                "set `of` to a retrieval task, or zeroshot of one label per picture"
            )
        texts, right = _different(matches)
        images, text_features = matches.pictures.features, matches.text_features[texts]
        columns = {"alignment": _alignment(images, text_features, right)}
        figures = {"alignment": float(columns["alignment"].mean())}
        for side, features in (("images", images), ("texts", text_features)):
            figures[f"uniformity/{side}"] = float(geometry.uniformity(features))
            figures[f"effective_rank/{side}"] = float(geometry.effective_rank(features))
        figures["modality_gap"] = float(geometry.modality_gap(images, text_features))
        labels = _labels(matches.pictures)
        if labels is not None and len(labels.unique()) < len(labels):
            figures["tolerance"] = metrics.tolerance(images, labels)
        tables = {"pictures": columns, "texts": {}}
        for side, anchors, candidates in (("texts", images, text_features), ("pictures", text_features, images)):
            if len(candidates) > _PLACES:
                counts = occurrences(anchors, candidates, _PLACES)
                tables[side]["occurrences"] = counts
                figures[f"hub_skewness/{side}"] = metrics.skewness(counts)
                figures[f"never_found/{side}"] = float((counts == 0).double().mean())
        figures["logit_scale"] = embedder.encoder.logit_scale
        keys = {"pictures": tuple(item.key for item in matches.pictures.items), "texts": _names(matches, texts)}
        items = tuple(Items(side, keys[side], columns) for side, columns in tables.items() if columns)
        notes: dict[str, object] = {"num_texts": len(texts), "places": _PLACES}
        return Outcome(figures, len(images), items, notes=notes)


def _different(found: Matches) -> tuple[Int[Tensor, " T"], list[list[int]]]:
    """Where each text first stands, and each picture's right ones among these."""
    place: dict[str, int] = {}
    of_text = [place.setdefault(text, len(place)) for text in found.texts]
    first = dict(zip(reversed(of_text), reversed(range(len(of_text))), strict=True))
    rows = torch.tensor([first[text] for text in range(len(place))])
    return rows, [sorted({of_text[text] for text in right}) for right in found.right]


def _names(found: Matches, texts: Int[Tensor, " T"]) -> tuple[str, ...]:
    return tuple(found.texts[text] for text in texts.tolist())


def _alignment(
    images: Float[Tensor, "N D"], texts: Float[Tensor, "T D"], right: list[list[int]]
) -> Float[Tensor, " N"]:
    """Of each picture, the mean over its texts."""
    rows = torch.tensor([row for row, some in enumerate(right) for _ in some])
    columns = torch.tensor([text for some in right for text in some])
    sums = torch.zeros(len(images), dtype=torch.float64)
    for row, column in zip(rows.split(_PAIRS), columns.split(_PAIRS), strict=True):
        apart = images[row].double() - texts[column].double()
        sums.index_add_(0, row, apart.square().sum(1))
    return sums / torch.bincount(rows, minlength=len(images))


def _labels(pictures: EmbeddedSet) -> Int[Tensor, " N"] | None:
    """Where each picture has one."""
    labels = [item.labels for item in pictures.items]
    return torch.tensor(labels)[:, 0] if all(len(some) == 1 for some in labels) else None
