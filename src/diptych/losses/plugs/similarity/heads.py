"""Several similarities, one for each part of the features."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych.errors import ConfigError
from diptych.losses.grid import Grid, dot
from diptych.losses.pairs import Side
from diptych.losses.plugs.family import Similarity


@dataclass(frozen=True)
class Heads(Similarity, name="heads"):
    """Features are divided into heads, each normalised and compared for itself; the loss is the mean of theirs.

        x^h_ij = ⟨I^h_i, T^h_j⟩ / (‖I^h_i‖ ‖T^h_j‖),   loss = 1/H Σ_h loss(x^h)

    Source: arXiv:2310.05615, multi-head projection (there with a projection network per head).
    Cost: the products of one head in all, H times the element-wise work.
    Use: with the temperature `adaptive`, where views of one pair agree in some aspects only.
    Verified: one head equals `dot`; several equal a dense float64 loss.
    """

    heads_count: int = 3
    """Number H of heads; must divide embed_dim."""

    def __post_init__(self) -> None:
        if self.heads_count < 1:
            raise ValueError(f"heads_count must be at least 1, not {self.heads_count}")

    def width(self, embed_dim: int) -> int:
        """Width of a head. Raises ConfigError where the features cannot be divided."""
        if embed_dim % self.heads_count:
            fitting = [str(n) for n in range(1, min(embed_dim, 32) + 1) if embed_dim % n == 0]
            raise ConfigError(
                f"embed_dim ({embed_dim}) is no multiple of {self.heads_count} heads · "
                f"objective.contrastive.similarity.heads_count · use one of {', '.join(fitting)}"
            )
        return embed_dim // self.heads_count

    def heads(self, grid: Grid) -> list[Grid]:
        """One grid for each head."""
        width = self.width(grid.rows.features.shape[1])
        return [
            replace(grid, rows=_part(grid.rows, head, width), columns=_part(grid.columns, head, width))
            for head in range(self.heads_count)
        ]

    def __call__(self, rows: Side, columns: Side, shared: Mapping[str, Tensor]) -> Float[Tensor, "R C"]:
        """Cosines of one head's parts."""
        return dot(rows, columns, shared)


def _part(side: Side, head: int, width: int) -> Side:
    part = side.features[:, head * width : (head + 1) * width]
    return replace(side, features=F.normalize(part, dim=1))
