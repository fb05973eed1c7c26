"""The denominator of the batch."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diptych.losses.plugs.family import AnchorSums, Denominator


@dataclass(frozen=True)
class Exact(Denominator, name="exact"):
    """The sum over the candidates there are.

        loss_i = log Σ_k w_ik exp(z_ik) − Σ_j π_ij z_ij

    Source: arXiv:2103.00020, figure 3.
    Cost: none.
    Use: the default.
    Verified: equals open_clip's ClipLoss.
    """

    def losses(self, sums: AnchorSums) -> Float[Tensor, " B"]:
        """Cross-entropy."""
        return sums.log_sum - sums.positive
