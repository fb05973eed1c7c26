"""Anchors count as the batch says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diptych.distributed.groups import Group
from diptych.losses.batch import Moment
from diptych.losses.plugs.family import SampleWeight


@dataclass(frozen=True)
class Given(SampleWeight, name="given"):
    """Factors that come with the batch as `sample_weights`, taken as they are.

        α_i = sample_weights_i

    Source: importance weighting, as in arXiv:2502.06733.
    Cost: none.
    Use: quality or credibility scores of pairs.
    Verified: dense float64; ones equal `uniform`.
    """

    needs: ClassVar[tuple[str, ...]] = ("sample_weights",)

    def __call__(
        self, losses: Float[Tensor, " B"], known: Mapping[str, Tensor], group: Group, moment: Moment
    ) -> Float[Tensor, " B"]:
        """The batch's own factors."""
        return known["sample_weights"].detach().to(losses.dtype)
