"""Which negatives are too near to be wrong, and which are near enough to teach."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.batch import Moment
from diptych.losses.grid import Grid
from diptych.losses.hardest import hardest
from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Weights


@dataclass(frozen=True)
class FalseNegatives(Weights, name="false_negatives"):
    """A candidate much nearer than the own partner is probably right as well and is dropped; of the rest, if asked,
    only the hardest are kept.

        w_ij = 0 if x_ij > x_ii + β;   with keep = k: w_ij = 0 unless x_ij is among the k largest of the others

    x are plain cosines. Candidates as similar as the k-th, to rounding, are kept with it.
    Source: arXiv:2504.17432 (β = 0.1, k = 8).
    Cost: one pass per tile; with `keep`, a pass over all pairs and a gather of the other side before the loss.
    Use: fine-tuning of strong models, whose in-batch neighbours are often right.
    Verified: dense float64; β large and no `keep` equals CLIP.
    """

    symmetric: ClassVar[bool] = False
    margin: float = 0.1
    """β on the cosine."""
    keep: int | None = None
    """k; none: all that are left."""

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep must be at least 1, not {self.keep}")

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """The own similarity of every anchor, and the k-th largest of the rest."""
        image, text = grid.own_of("image").features, grid.own_of("text").features
        own = torch.linalg.vecdot(image, text).detach()
        grid = grid.know("own_similarity", rows=own, columns=own)
        if self.keep is None:
            return grid
        known: dict[str, Tensor | None] = {"rows": None, "columns": None}
        for direction in grid.directions:
            values = hardest(grid, direction, self.keep, allowed=self._allowed).similarity
            # The tile that is folded later may round differently from the one that was searched.
            known[direction] = values[:, -1] - 16 * torch.finfo(values.dtype).eps
        return grid.know("threshold", **known)

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """-inf at what is dropped."""
        allowed = self._allowed(tile)
        if self.keep is not None:
            allowed = allowed & (tile.similarity.detach() >= tile.anchor["threshold"][:, None])
        return torch.zeros_like(tile.logits).masked_fill_(~(allowed | tile.own()), -torch.inf)

    def _allowed(self, tile: Tile) -> Tensor:
        limit = tile.anchor["own_similarity"][:, None] + self.margin
        return (tile.similarity.detach() <= limit) & ~tile.own()


@dataclass(frozen=True)
class Hardest(Weights, name="hardest"):
    """Only an anchor's nearest negatives are candidates.

        w_ij = 1 for the k largest x_ij, j ≠ i, and for j = i; else 0

    Source: arXiv:2012.09740, the hard contrastive loss.
    Cost: a pass over all pairs and a gather of the other side before the loss.
    Use: to study hardness apart from temperature.
    Verified: dense float64; k = N − 1 equals CLIP.
    """

    symmetric: ClassVar[bool] = False
    keep: int = 128
    """k."""

    def __post_init__(self) -> None:
        FalseNegatives(margin=torch.inf, keep=self.keep)

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """The k-th largest similarity of every anchor."""
        return self._filter.prepare(grid, moment)

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """-inf at what is dropped."""
        return self._filter(tile)

    @property
    def _filter(self) -> FalseNegatives:
        return FalseNegatives(margin=torch.inf, keep=self.keep)
