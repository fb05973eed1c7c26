"""Cosines."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diptych.losses.grid import dot
from diptych.losses.pairs import Side
from diptych.losses.plugs.family import Similarity


@dataclass(frozen=True)
class Dot(Similarity, name="dot"):
    """Cosine of the two features.

        x_ij = ⟨I_i, T_j⟩

    Source: arXiv:2103.00020, figure 3.
    Cost: one product per pair.
    Use: the default.
    Verified: values and gradients against a dense float64 loss and against open_clip's.
    """

    def __call__(self, rows: Side, columns: Side, shared: Mapping[str, Tensor]) -> Float[Tensor, "R C"]:
        """[R, D] × [C, D] → [R, C]."""
        return dot(rows, columns, shared)
