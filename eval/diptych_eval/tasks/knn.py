"""k nearest neighbours: a picture's class is voted for by the training pictures that lie nearest to it.

Protocol: the weighted k-NN of arXiv:2104.14294 (DINO). The k training pictures of highest cosine vote for their
classes, each with exp(cosine / temperature). Nothing is learned, so nothing is chosen.

Ties: training pictures that tie for the last of the k places share them (`diptych_eval.neighbours`); classes with
equal votes count against the model, so a class without a vote is never among the first five.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from diptych.errors import DataError
from diptych_eval import metrics
from diptych_eval.embedder import Embedder
from diptych_eval.labelled import Labelled, LabelledTask, judged
from diptych_eval.neighbours import nearest
from diptych_eval.tasks.family import Outcome


@dataclass(frozen=True)
class KNN(LabelledTask, name="knn"):
    """k nearest neighbours."""

    k: int = 20
    """Pictures that vote."""
    temperature: float = 0.07
    """Of a vote, exp(cosine / temperature)."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.temperature <= 0:
            raise ValueError("k must be at least 1, temperature greater than 0")

    def run(self, embedder: Embedder) -> Outcome:
        """See Task. Raises DataError for labels that do not fit, and for fewer training pictures than k."""
        train, test = self.embed(embedder)
        if len(train) < self.k:
            raise DataError(f"{len(train):,} pictures to learn from, fewer than k={self.k} · {train.where} · lower k")
        ranks = vote(train, test, k=self.k, temperature=self.temperature)
        figures, items = judged(test, ranks)
        return Outcome(
            figures, len(test), (items,), notes={"num_training": len(train), "num_candidates": len(train.classes)}
        )


def vote(train: Labelled, test: Labelled, *, k: int, temperature: float) -> Int[Tensor, " N"]:
    """Rank of each test picture's class by votes."""
    ranks = []
    for block in nearest(test.features, train.features, k):
        first, last = int(block.anchors[0]), int(block.anchors[-1]) + 1
        votes = torch.zeros(last - first, len(train.classes), dtype=torch.float64)
        places = (block.anchors - first, train.labels[block.candidates])
        votes.index_put_(places, block.shares * (block.scores.double() / temperature).exp(), accumulate=True)
        ranks.append(metrics.class_ranks(votes, test.labels[first:last]))
    return torch.cat(ranks)
