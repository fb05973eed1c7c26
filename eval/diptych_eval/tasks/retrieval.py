"""Image-text retrieval: recall@1/5/10 both ways.

A picture may have several captions, and one caption text may belong to several pictures: a picture finds what it should
with any of its captions, a text with any picture that carries it. Equal texts are one candidate.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diptych.errors import DataError
from diptych_eval import metrics
from diptych_eval.embed import EmbeddedSplit
from diptych_eval.encoder import Encoder
from diptych_eval.tasks.family import Outcome, Prediction, Task

_KEPT = 5


@dataclass(frozen=True)
class Retrieval(Task, name="retrieval"):
    """Retrieval over a set of shards."""

    path: str
    """Folder, glob or brace pattern of shards."""
    forms: tuple[tuple[str, ...], ...] = (("txt",),)
    """Captions of a picture. A form of one column gives a caption per text; a form of several gives one caption: all
    their texts joined by `, `."""

    def shards(self) -> str:
        """See Task."""
        return self.path

    def run(self, encoder: Encoder, split: EmbeddedSplit) -> Outcome:
        """See Task. Raises DataError for a picture without caption."""
        position: dict[str, int] = {}
        right = tuple(self._captions(split, i, position) for i in range(len(split)))
        owners: list[list[int]] = [[] for _ in position]
        for picture, texts in enumerate(right):
            for text in texts:
                owners[text].append(picture)
        text_features = encoder.encode_text(list(position))
        to_text = metrics.ranks(split.features, text_features, right)
        to_image = metrics.ranks(text_features, split.features, owners)
        figures, intervals = {}, {}
        for name, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
            for k in (1, 5, 10):
                figures[f"{name}/recall@{k}"] = metrics.recall_at(ranks, k)
                intervals[f"{name}/recall@{k}"] = metrics.bootstrap_interval((ranks <= k).double())
            figures[f"{name}/median_rank"] = metrics.median_rank(ranks)
        return Outcome(
            figures,
            intervals,
            len(split),
            tuple(position),
            text_features,
            _predictions(split.features, text_features, to_text),
            _predictions(text_features, split.features, to_image),
            right,
        )

    def _captions(self, split: EmbeddedSplit, number: int, position: dict[str, int]) -> tuple[int, ...]:
        """The captions of one picture as positions among all texts; new texts are added."""
        columns = split.captions[number]
        texts: list[str] = []
        for form in self.forms:
            if len(form) == 1:
                texts += columns.get(form[0], ())
            else:
                texts.append(", ".join(text for column in form for text in columns.get(column, ())))
        texts = [text for text in dict.fromkeys(texts) if text]
        if not texts:
            raise DataError(f"sample {split.keys[number]!r} has no caption in {self.forms} · {self.path}")
        return tuple(position.setdefault(text, len(position)) for text in texts)


def _predictions(
    anchors: Float[Tensor, "N D"], candidates: Float[Tensor, "M D"], ranks: Tensor
) -> tuple[Prediction, ...]:
    predictions: list[Prediction] = []
    for start in range(0, len(anchors), 1024):
        best = (anchors[start : start + 1024] @ candidates.T).topk(min(_KEPT, len(candidates)))
        for row in range(len(best.indices)):
            ranked = tuple(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True))
            predictions.append(Prediction(start + row, ranked, int(ranks[start + row])))
    return tuple(predictions)
