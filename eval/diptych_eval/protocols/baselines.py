"""What tuning must beat: methods that leave the model as it is."""

from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.seeding import derive
from diptych_eval import metrics
from diptych_eval.labelled import Labelled
from diptych_eval.probe import Problem

_RESIDUALS, _SHARPNESSES = (1.0, 3.0, 10.0, 30.0, 100.0), (5.5, 1.0, 3.0, 10.0, 30.0)
_PROBE_STRENGTH = 0.03
"""As in the task `few_shot`."""
_EPOCHS, _BATCH, _PEAK_LR, _EPS = 20, 256, 1e-3, 1e-4
"""Of Tip-Adapter-F, as its authors have them."""


def linear_probe(drawn: Labelled, test: Labelled) -> Float[Tensor, "N C"]:
    """Scores of the classifier of `few_shot`."""
    return Problem(drawn).solve(_PROBE_STRENGTH).scores(test.features)


@dataclass(frozen=True)
class Cache:
    """Tip-Adapter: zero-shot logits and votes of the drawn pictures, each as near as it is.

        s·f·Wᵀ + α·exp(−β·(1 − f·Fᵀ))·L          F: the drawn pictures' features, L: their classes, one-hot

    Source: arXiv:2111.03930, eq. 3-6.
    """

    drawn: Labelled
    classes: Float[Tensor, "C D"]
    """W: the classes' text features."""
    logit_scale: float
    """s."""

    def scores(
        self, features: Float[Tensor, "N D"], residual: float, sharpness: float, *, left_out: bool = False
    ) -> Float[Tensor, "N C"]:
        """Of pictures, by α and β.

        Args:
            left_out: the features are those of the drawn pictures, and none votes for itself.
        """
        votes = (-sharpness * (1 - features @ self.drawn.features.T)).exp()
        if left_out:
            votes.fill_diagonal_(0)
        labels = F.one_hot(self.drawn.labels, len(self.drawn.classes)).to(features.dtype)
        return self.logit_scale * features @ self.classes.T + residual * votes @ labels

    def chosen(self) -> tuple[float, float]:
        """The α and β, of a grid, that do best on the drawn pictures, each left out in turn (the authors take pictures
        that are held out, which few shots do not have). With one picture of a class there is nothing to see: 1 and
        5.5, the paper's."""
        if len(self.drawn) <= len(self.drawn.classes):
            return _RESIDUALS[0], _SHARPNESSES[0]

        def merit(pair: tuple[float, float]) -> float:
            return top1(self.scores(self.drawn.features, *pair, left_out=True), self.drawn.labels)

        return max(product(_RESIDUALS, _SHARPNESSES), key=merit)

    def trained(self, residual: float, sharpness: float, *, seed: int, epochs: int = _EPOCHS) -> "Cache":
        """Tip-Adapter-F: F is learned from the drawn pictures, from their features on, by AdamW with a cosine; all else
        stays.

        Source: arXiv:2111.03930, section 3.3. There each epoch crops the pictures anew; here their features are those
        of the one view that everything is measured in.

        Args:
            seed: of the order of the pictures.
        """
        pictures, labels = self.drawn.features, self.drawn.labels
        keys = nn.Parameter(pictures.clone())
        learning = replace(self, drawn=replace(self.drawn, features=keys))
        optimizer = torch.optim.AdamW([keys], lr=_PEAK_LR, eps=_EPS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs * -(-len(labels) // _BATCH), 1))
        generator = torch.Generator().manual_seed(derive(seed, "keys"))
        for _ in range(epochs):
            for rows in torch.randperm(len(labels), generator=generator).split(_BATCH):
                optimizer.zero_grad()
                F.cross_entropy(learning.scores(pictures[rows], residual, sharpness), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        return replace(self, drawn=replace(self.drawn, features=keys.detach()))


def top1(scores: Float[Tensor, "N C"], labels: Tensor) -> float:
    """Share of the pictures whose class scores above all others; equal scores count against it."""
    return float((metrics.class_ranks(scores, labels) <= 1).double().mean())


def harmonic_mean(first: float, second: float) -> float:
    """Of two shares; 0 where one of them is."""
    return 2 * first * second / (first + second) if first + second > 0 else 0.0


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95% interval by Student's t; NaN for one seed."""
    numbers = torch.tensor(values, dtype=torch.float64)
    if len(numbers) < 2:
        return float(numbers.mean()), float("nan")
    return float(numbers.mean()), _quantile(len(numbers) - 1) * float(numbers.std()) / len(numbers) ** 0.5


_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""0.975 of Student's t with 1, 2, ... degrees of freedom."""
_NORMAL = 1.95996


def _quantile(freedom: int) -> float:
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    return _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * freedom)  # the first term of its series: off by 0.007 at most
