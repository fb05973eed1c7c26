"""Image-text retrieval: recall@1/5/10 both ways, their mean, and median ranks.

A picture may have several captions: it finds what it should with any of them, a text with the picture it belongs to.
Every caption is a candidate of its own, as in the published protocols, also where two are equal; with
`equal_texts: one` they are one candidate that is right for all their pictures. Ties count against the model
(`diptych_eval.metrics`).
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from diptych_eval import metrics
from diptych_eval.captioned import CaptionedTask
from diptych_eval.embedder import Embedder
from diptych_eval.rerank import ranks_again
from diptych_eval.tasks.family import Items, Matches, Outcome

_AT = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval(CaptionedTask, name="retrieval"):
    """Retrieval over shards, or over pictures that an annotation file names."""

    equal_texts: Literal["each", "one"] = "each"
    """Whether captions with the same words are candidates of their own, or one."""
    rerank: int = 0
    """Above 0: this many nearest candidates are put in the order of the model's matching head (ALBEF)."""

    def __post_init__(self) -> None:
        if self.rerank < 0:
            raise ValueError(f"rerank must be at least 0, not {self.rerank}")

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError for a picture without caption."""
        found = embedder.pictures(self.pictures)
        captions = self.captions_of(found.items)
        texts, right = _candidates(captions, together=self.equal_texts == "one")
        features = embedder.texts(texts)
        to_text, to_image = metrics.ranks_both_ways(found.features, features, right)
        if self.rerank:
            again = ranks_again(embedder, found, texts, right, self.rerank)
            to_text, to_image = (
                torch.where(new > 0, new, old) for new, old in zip(again, (to_text, to_image), strict=True)
            )
        figures: dict[str, float] = {}
        tables = []
        keys = tuple(item.key for item in found.items)
        numbers = {text: str(item.number) for item, some in zip(found.items, right, strict=True) for text in some}
        clusters = tuple(numbers[text] for text in range(len(texts)))  # captions of one picture
        for name, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
            columns = {f"{name}/recall@{k}": (ranks <= k).double() for k in _AT}
            figures |= {column: float(values.mean()) for column, values in columns.items()}
            by_picture = name == "image_to_text"
            tables.append(Items("pictures", keys, columns) if by_picture else Items("texts", texts, columns, clusters))
        figures["mean_recall"] = sum(figures.values()) / len(figures)
        figures["image_to_text/median_rank"] = metrics.median_rank(to_text)
        figures["text_to_image/median_rank"] = metrics.median_rank(to_image)
        matches = Matches(found, texts, features, right, to_text, to_image)
        return Outcome(figures, len(found), tuple(tables), matches, {"num_candidates": len(texts)})


def _candidates(
    captions: list[tuple[str, ...]], *, together: bool
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """All texts, and for each picture the places of its own among them."""
    if not together:
        texts = tuple(text for some in captions for text in some)
        ends = list(accumulate(len(some) for some in captions))
        return texts, tuple(tuple(range(end - len(some), end)) for some, end in zip(captions, ends, strict=True))
    place: dict[str, int] = {}
    right = tuple(tuple(place.setdefault(text, len(place)) for text in dict.fromkeys(some)) for some in captions)
    return tuple(place), right
