"""How well compositions are told apart of which some were trained and some were not: a sweep over the bias for these.

To every untrained candidate's score a bias b is added. For each b from -inf to inf: the share right of the pictures of
trained compositions, S(b), and of untrained ones, U(b). At -inf only trained ones are ever said, at inf only untrained.

Source: Purushwalkam et al., ICCV 2019, section 4.2 (there at sampled b; here at every b at which something changes).

In an open world every attribute may go with every object, and most of these pairs make no sense; `feasibility` says how
much a pair is like those that were trained.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ENTRIES = 2**24
"""Of the matrix of pictures and candidates that is in memory at once."""
_THRESHOLDS = 21


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


@dataclass(frozen=True)
class Asked:
    """Pictures, and the candidates that they are compared with."""

    pictures: Float[Tensor, "N D"]
    classes: Float[Tensor, "C D"]
    labels: Int[Tensor, " N"]
    is_trained: Bool[Tensor, " C"]

    def sweep(self, is_candidate: Bool[Tensor, " C"] | None = None) -> Sweep:
        """The sweep over those of the classes that are candidates; a picture of another is wrong at every bias.

        Raises:
            ValueError: see `bias_sweep`.
        """
        _check(self.labels, self.is_trained)
        count = max(1, _ENTRIES // len(self.classes))
        parts = []
        for pictures, labels in zip(self.pictures.split(count), self.labels.split(count), strict=True):
            scores = pictures @ self.classes.T
            if is_candidate is not None:
                scores = scores.masked_fill(~is_candidate, -torch.inf)
            parts.append(_rivals(scores, labels, self.is_trained))
        return _sweep(torch.cat(parts, 1), self.is_trained[self.labels])


def bias_sweep(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], is_trained: Bool[Tensor, " C"]) -> Sweep:
    """The sweep, exact; equal scores count against the model.

    Raises:
        ValueError: there are no trained candidates, or no untrained ones, or pictures of one kind only.
    """
    _check(labels, is_trained)
    return _sweep(_rivals(scores, labels, is_trained), is_trained[labels])


def _check(labels: Int[Tensor, " N"], is_trained: Bool[Tensor, " C"]) -> None:
    of_trained = is_trained[labels]
    if is_trained.all() or not is_trained.any() or of_trained.all() or not of_trained.any():
        raise ValueError("a sweep needs candidates and pictures of trained and of untrained compositions")


def _rivals(
    scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"], is_trained: Bool[Tensor, " C"]
) -> Float[Tensor, "3 N"]:
    """Of each picture the scores of the right candidate, of the best other trained and of the best other untrained."""
    scores = scores.double()
    right = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return torch.stack([right, *(others.masked_fill(mask, -torch.inf).amax(1) for mask in (~is_trained, is_trained))])


def _sweep(rivals: Float[Tensor, "3 N"], of_trained: Bool[Tensor, " N"]) -> Sweep:
    right, best = rivals[0], rivals[1:]
    kinds = torch.where(of_trained, 0, 1)
    rows = torch.arange(len(right))
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


def feasibility(
    pairs: Int[Tensor, "C 2"],
    is_trained: Bool[Tensor, " C"],
    attributes: Float[Tensor, "A D"],
    objects: Float[Tensor, "O D"],
) -> Float[Tensor, " C"]:
    """How much each pair (a, o) is like what was trained, from unit-norm features of attributes and objects alone.

        1/2 · ( max cos(a, a') over attributes a' trained with o  +  max cos(o, o') over objects o' trained with a )

    -1 stands for a maximum over none; a pair that was trained has infinity.

    Source: arXiv:2101.12609, and arXiv:2204.03574 in the open world (there from GloVe's vectors of words).
    """
    seen = torch.zeros(len(attributes), len(objects), dtype=torch.bool)
    seen[pairs[is_trained, 0], pairs[is_trained, 1]] = True
    alike = [features.double() @ features.double().T for features in (attributes, objects)]
    # Row a', column o: the most that an attribute is like those of o; and the same with the parts exchanged.
    of_attribute = torch.stack([alike[0].masked_fill(~one, -1).amax(1) for one in seen.T], 1)
    of_object = torch.stack([alike[1].masked_fill(~one, -1).amax(1) for one in seen])
    found = (of_attribute + of_object)[pairs[:, 0], pairs[:, 1]] / 2
    return found.masked_fill(is_trained, torch.inf)


def choose_threshold(held_out: Asked, feasible: Float[Tensor, " C"]) -> float:
    """The threshold, of a grid from the least feasibility to the greatest, whose candidates have the largest area on
    pictures held out; of several the lowest.

    Raises:
        ValueError: see `bias_sweep`.
    """
    finite = feasible[feasible.isfinite()]
    if not len(finite):
        raise ValueError("a threshold needs candidates that were not trained")
    grid = torch.linspace(float(finite.min()), float(finite.max()), _THRESHOLDS, dtype=torch.double).tolist()
    return float(max(grid, key=lambda threshold: held_out.sweep(feasible >= threshold).area))
