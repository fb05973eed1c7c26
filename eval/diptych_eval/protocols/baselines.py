"""What tuning must beat: methods that train no model."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych_eval import metrics
from diptych_eval.labelled import Labelled
from diptych_eval.probe import Problem

_PROBE_STRENGTH = 0.03
"""As in the task `few_shot`."""


def linear_probe(drawn: Labelled, test: Labelled) -> Float[Tensor, "N C"]:
    """Scores of the classifier of `few_shot`."""
    return Problem(drawn).solve(_PROBE_STRENGTH).scores(test.features)


def tip_adapter(
    drawn: Labelled,
    test: Labelled,
    classes: Float[Tensor, "C D"],
    logit_scale: float,
    *,
    residual: float = 1.0,
    sharpness: float = 5.5,
) -> Float[Tensor, "N C"]:
    """Zero-shot logits and votes of the drawn pictures, each as near as it is.

        s·f·Wᵀ + α·exp(−β·(1 − f·Fᵀ))·L          F: the drawn pictures' features, L: their classes, one-hot

    Source: arXiv:2111.03930, eq. 3-6, without training; α = 1 and β = 5.5 are its defaults.

    Args:
        residual: α.
        sharpness: β.
    """
    votes = (-sharpness * (1 - test.features @ drawn.features.T)).exp() @ F.one_hot(
        drawn.labels, len(drawn.classes)
    ).to(test.features.dtype)
    return logit_scale * test.features @ classes.T + residual * votes


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
