"""How well compositions are told apart of which some were trained and some were not: a sweep over the bias for these.

To every untrained candidate's score a bias b is added. For each b from -inf to inf: the share right of the pictures of
trained compositions, S(b), and of untrained ones, U(b). At -inf only trained ones are ever said, at inf only untrained.

Source: Purushwalkam et al., ICCV 2019, section 4.2 (there at sampled b; here at every b at which something changes).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sweep:
    """Both shares at each bias, from least to greatest."""

    trained: Float[Tensor, " K"]
    untrained: Float[Tensor, " K"]

    @property
    def area(self) -> float:
        """Under U over S (AUC), by trapezoids."""
        return float(-torch.trapezoid(self.untrained, self.trained))

    @property
    def harmonic_mean(self) -> float:
        """The best of any bias."""
        total = self.trained + self.untrained
        return float(torch.where(total > 0, 2 * self.trained * self.untrained / total, 0).max())


def bias_sweep(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], is_trained: Bool[Tensor, " C"]) -> Sweep:
    """The sweep, exact; equal scores count against the model.

    Raises:
        ValueError: there are no trained candidates, or no untrained ones, or pictures of one kind only.
    """
    of_trained = is_trained[labels]
    if is_trained.all() or not is_trained.any() or of_trained.all() or not of_trained.any():
        raise ValueError("a sweep needs candidates and pictures of trained and of untrained compositions")
    scores = scores.double()
    right = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], -torch.inf)
    kinds = torch.where(of_trained, 0, 1)
    masks = torch.stack([is_trained, ~is_trained])
    best = torch.stack([others.masked_fill(~mask, -torch.inf).amax(1) for mask in masks])
    rows = torch.arange(len(labels))
    is_best_of_its_kind = right > best[kinds, rows]
    # A trained one is right while b stays below this, an untrained one where b is above its own.
    limit = torch.where(of_trained, right - best[1], best[0] - right)
    limits = limit[is_best_of_its_kind & limit.isfinite()].unique()
    low = limits[:1] - 1 if len(limits) else torch.zeros(1, dtype=torch.double)
    # Between two limits nothing changes; at a limit scores are equal, which is right for nobody.
    biases = torch.cat([low, (limits[1:] + limits[:-1]) / 2, limits[-1:] + 1]) if len(limits) else low

    def share(mask: Tensor, is_right: Tensor) -> Tensor:
        return is_right[mask].double().mean(0)

    below = is_best_of_its_kind[:, None] & (biases[None] < limit[:, None])
    above = is_best_of_its_kind[:, None] & (biases[None] > limit[:, None])
    return Sweep(share(of_trained, below), share(~of_trained, above))
