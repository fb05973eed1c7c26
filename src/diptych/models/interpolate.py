"""Between two models: weights on the straight line from one to the other."""

import torch

from diptych.errors import ConfigError
from diptych.models.dual_encoder import DualEncoder


@torch.no_grad()
def interpolate(base: DualEncoder, tuned: DualEncoder, share: float) -> DualEncoder:
    """The base, changed in place to (1 − share)·base + share·tuned, weight by weight.

    Tuning gains where it was tuned and loses elsewhere; in between much of both is kept.
    Source: arXiv:2109.01903 (WiSE-FT), eq. 1.

    Args:
        tuned: from the same base, its adapters merged.
        share: 0 is the base, 1 the tuned model; beyond that it goes on in the same direction.

    Raises:
        ConfigError: they are of different architectures.
    """
    ours, theirs = base.state_dict(), tuned.state_dict()
    wrong = sorted(ours.keys() ^ theirs.keys()) or [n for n in ours if ours[n].shape != theirs[n].shape]
    if wrong:
        raise ConfigError(
            f"the models are of different architectures ({wrong[0]} is in one of them, or of another shape) · "
            "interpolate · name a model and what was tuned from it"
        )
    for name, weight in ours.items():
        if weight.is_floating_point():
            weight.lerp_(theirs[name].to(weight.device), share)
    return base
