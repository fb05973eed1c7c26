"""A denominator remembered from step to step, for every sample."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.losses.plugs.family import AnchorSums, Denominator
from diptych.losses.table import SampleTable


@dataclass(frozen=True)
class Sogclr(Denominator, name="sogclr"):
    """The batch's mean over negatives is averaged over the steps in which the sample was met.

        g_i = mean_{j≠i} exp(z_ij − z_ii),   u_i ← (1−γ) u_i + γ g_i  (first visit: u_i = g_i)
        gradient of  τ · mean_i  sg[1/u_i] · g_i,   τ = sg[1/s]

    so with u_i = g_i it is τ times the decoupled loss. The logit scale gets no gradient: it stays where it starts,
    unless another term trains it. State: one number per sample and modality, as a logarithm.
    Source: arXiv:2202.12387 (γ multiplies the new value; 0.8 for image-text pairs).
    Cost: one exchange of a number per anchor; 2·num_samples/W numbers of memory per rank.
    Use: small batches; data small enough to be seen several times.
    Verified: γ = 1 has the gradient of `decoupled` times τ; dense float64 over several steps; 1, 2 and 4 ranks.
    """

    needs: ClassVar[tuple[str, ...]] = ("sample_ids",)
    num_samples: int = 1_000_000
    """Slots of the table: at least the number of samples, or hashed ids will share some."""
    gamma: float = 0.8
    """γ, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or self.num_samples < 1:
            raise ValueError(
                f"gamma must lie in (0, 1] and num_samples be at least 1, not {self.gamma} and {self.num_samples}"
            )

    def build(self, embed_dim: int) -> nn.Module:
        """The tables."""
        return MovingAverage(self)


class MovingAverage(nn.Module, Denominator):
    """See `Sogclr`."""

    needs = Sogclr.needs
    drops_own = True
    wants_count = True

    def __init__(self, config: Sogclr) -> None:
        super().__init__()
        self._gamma = config.gamma
        self.image = SampleTable(config.num_samples, (-math.inf,))
        self.text = SampleTable(config.num_samples, (-math.inf,))

    def losses(self, sums: AnchorSums) -> Float[Tensor, " B"]:
        """Losses whose gradient is the one above; their value is τ·g/u·log g. Every rank of the world must call."""
        table = self.image if sums.anchors.modality == "image" else self.text
        ids = sums.anchors["sample_ids"]
        log_g, some = log_mean(sums)
        log_old = table.look_up(ids)[:, 0]
        log_u = averaged(log_old, log_g.detach(), self._gamma)
        if torch.is_grad_enabled():  # measuring a loss is no visit
            table.store(ids, torch.where(some, log_u, log_old)[:, None])
        return torch.where(some, (log_g.detach() - log_u).exp() * log_g, 0.0) / sums.logit_scale.detach()


def log_mean(sums: AnchorSums) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """log of the mean over negatives of exp(z_ij − z_ii), and which anchors have any negatives."""
    log_g = sums.log_sum - sums.positive - sums.num_candidates.clamp(min=1).log()
    return log_g, sums.num_candidates > 0


def averaged(log_old: Float[Tensor, " B"], log_new: Float[Tensor, " B"], gamma: float) -> Float[Tensor, " B"]:
    """log of (1−γ)·old + γ·new; of new alone where there is no old one."""
    kept = math.log1p(-gamma) if gamma < 1 else -math.inf
    mixed = torch.logaddexp(log_old + kept, log_new + math.log(gamma))
    return torch.where(log_old == -math.inf, log_new, mixed)
