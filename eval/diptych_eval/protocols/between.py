"""Which model between a base and what was tuned from it does best on pictures that are held out for that."""

import copy

from diptych.encoder import ModelEncoder
from diptych.errors import DataError
from diptych.models.dual_encoder import DualEncoder
from diptych.models.interpolate import interpolate
from diptych_eval.headline import headlines
from diptych_eval.suite import EvalConfig, evaluate

SHARES = tuple(number / 10 for number in range(11))


def sweep(base: DualEncoder, tuned: DualEncoder, config: EvalConfig) -> dict[float, float]:
    """Share of the tuned model → mean of the tasks' headline figures. Source: arXiv:2109.01903, section 3.

    Raises:
        DataError: a set cannot be used, or no task has a headline.
    """
    found = {}
    for share in SHARES:
        results = evaluate(ModelEncoder(interpolate(copy.deepcopy(base), tuned, share)), config)
        figures = [result.metrics[name] for result in results for name in headlines(result)]
        if not figures:
            raise DataError("no task has a figure to choose by · interpolate --choose · name one such as zeroshot")
        found[share] = sum(figures) / len(figures)
    return found
