"""Image-text retrieval: recall@1/5/10 both ways, their mean, and median ranks.

A picture may have several captions: it finds what it should with any of them, a text with the picture it belongs to.
Every caption is a candidate of its own, as in the published protocols, also where two are equal; with
`equal_texts: one` they are one candidate that is right for all their pictures. Ties count against the model
(`diptych_eval.metrics`).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

from diptych.data.shards import list_shards
from diptych.errors import DataError
from diptych_eval import metrics
from diptych_eval.annotated import Captioned, read_captions
from diptych_eval.embedder import EmbeddedSet, Embedder
from diptych_eval.pictures import ShardPictures
from diptych_eval.tasks.family import Items, Matches, Outcome, Task

_AT = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval(Task, name="retrieval"):
    """Retrieval over shards, or over pictures that an annotation file names."""

    path: str
    """Folder, glob or brace pattern of shards; with `annotations`, the folder of the pictures."""
    annotations: Path | None = None
    """Karpathy's JSON of COCO or Flickr30k, COCO's own captions, or XM3600's captions.jsonl; none: captions are in the
    shards."""
    split: str = "test"
    """Of Karpathy's JSON."""
    language: str = "en"
    """Of XM3600's captions."""
    forms: tuple[tuple[str, ...], ...] = (("txt",),)
    """Captions of a picture in shards. A form of one column gives a caption per text; a form of several gives one
    caption: all their texts joined by `, `."""
    equal_texts: Literal["each", "one"] = "each"
    """Whether captions with the same words are candidates of their own, or one."""

    @cached_property
    def _annotated(self) -> Captioned | None:
        if self.annotations is None:
            return None
        return read_captions(self.annotations, Path(self.path), split=self.split, language=self.language)

    def files(self) -> tuple[str, ...]:
        """See Task."""
        if self._annotated is None:
            return list_shards(self.path)
        return (str(self.annotations), *self._annotated.pictures.files)

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError for a picture without caption."""
        annotated = self._annotated
        found = embedder.pictures(annotated.pictures if annotated is not None else ShardPictures(self.path))
        if annotated is not None:
            captions = [annotated.captions[item.number] for item in found.items]
        else:
            captions = [self._captions(found, row) for row in range(len(found))]
        texts, right = _candidates(captions, together=self.equal_texts == "one")
        features = embedder.texts(texts)
        to_text, to_image = metrics.ranks_both_ways(found.features, features, right)
        figures: dict[str, float] = {}
        tables = []
        keys = {"image_to_text": tuple(item.key for item in found.items), "text_to_image": texts}
        for name, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
            columns = {f"{name}/recall@{k}": (ranks <= k).double() for k in _AT}
            figures |= {column: float(values.mean()) for column, values in columns.items()}
            tables.append(Items("pictures" if name == "image_to_text" else "texts", keys[name], columns))
        figures["mean_recall"] = sum(figures.values()) / len(figures)
        figures["image_to_text/median_rank"] = metrics.median_rank(to_text)
        figures["text_to_image/median_rank"] = metrics.median_rank(to_image)
        matches = Matches(found, texts, features, right, to_text, to_image)
        return Outcome(figures, len(found), tuple(tables), matches, {"num_candidates": len(texts)})

    def _captions(self, found: EmbeddedSet, row: int) -> tuple[str, ...]:
        item = found.items[row]
        texts: list[str] = []
        for form in self.forms:
            if len(form) == 1:
                texts += item.captions.get(form[0], ())
            else:
                texts.append(", ".join(text for column in form for text in item.captions.get(column, ())))
        texts = [text for text in dict.fromkeys(texts) if text]
        if not texts:
            raise DataError(f"sample {item.key!r} has no caption in {self.forms} · {self.path} · correct forms")
        return tuple(texts)


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
