"""Which model between a base and what was tuned from it does best on pictures that are held out for that."""

import copy
from collections.abc import Callable, Mapping

from diptych.encoder import ModelEncoder
from diptych.errors import DataError
from diptych.models.dual_encoder import DualEncoder
from diptych.models.interpolate import interpolate
from diptych_eval.headline import headlines
from diptych_eval.suite import EvalConfig, evaluate

SHARES = tuple(number / 10 for number in range(11))


def sweep(base: DualEncoder, tuned: DualEncoder, figure: Callable[[ModelEncoder], float]) -> dict[float, float]:
    """Share of the tuned model → the model's figure there. Source: arXiv:2109.01903, section 3."""
    return {share: figure(ModelEncoder(interpolate(copy.deepcopy(base), tuned, share))) for share in SHARES}


def best(by_share: Mapping[float, float]) -> float:
    """The share with the highest figure; of several the one nearest to the base."""
    return max(sorted(by_share), key=lambda share: by_share[share])


def headline_mean(config: EvalConfig) -> Callable[[ModelEncoder], float]:
    """A figure: the mean of the tasks' headline figures. It raises DataError where a set cannot be used, or no task has
    a headline."""

    def figure(encoder: ModelEncoder) -> float:
        figures = [result.metrics[name] for result in evaluate(encoder, config) for name in headlines(result)]
        if not figures:
            raise DataError("no task has a figure to choose by · interpolate --choose · name one such as zeroshot")
        return sum(figures) / len(figures)

    return figure
