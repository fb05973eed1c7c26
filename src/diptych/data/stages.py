"""A run's first part on smaller pictures and shorter captions (CLIPA, arXiv:2305.07017), or with less that learns.

Which stage a batch belongs to is a pure function of its first slot, so that ranks, workers and a resumed run agree on
it without a word. Slots count the samples read. They equal `samples_seen` until a guard goes back to a checkpoint: the
run then reads on where it was, and by `samples_seen` its stages end earlier.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from diptych.config import Config


@dataclass(frozen=True)
class Stage(Config):
    """What batches are made of, and what learns from them, up to a point of the run."""

    until_samples: int
    """Its batches are those that begin before this sample of the run; above that of the stage before."""
    image_size: int | None = None
    """Side of the pictures, pixels; one that the image tower takes. None: the model's own."""
    context_length: int | None = None
    """Token ids of a caption; longer ones are cut and keep their end-of-text token. None: the model's own, the most."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that do not learn yet: `[image_tower]` trains what stands on it first
    (LP-FT, arXiv:2202.10054). On one process, or under plain DDP."""

    def __post_init__(self) -> None:
        for name in ("until_samples", "image_size", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, not {value}")


def check_stages(stages: Sequence[Stage], total_samples: int) -> None:
    """Raises ValueError where the stages do not follow each other, or outlast the run."""
    ends = [stage.until_samples for stage in stages]
    for before, end in pairwise(ends):
        if end <= before:
            raise ValueError(
                f"stages must be in the order of until_samples, each above the one before: {end}, {before}"
            )
    if ends and ends[-1] > total_samples:
        raise ValueError(f"until_samples of a stage ({ends[-1]}) exceeds total_samples ({total_samples})")


@dataclass(frozen=True)
class Form:
    """How large the pictures and how long the captions of a batch are."""

    image_size: int
    """Side in pixels."""
    context_length: int
    """Token ids of a caption, at most."""


def stage_at(slot: int, stages: Sequence[Stage]) -> Stage | None:
    """That of the batch that begins at this slot; none behind the last one."""
    return next((stage for stage in stages if slot < stage.until_samples), None)


def form_at(slot: int, stages: Sequence[Stage], whole: Form) -> Form:
    """The form of the batch that begins at this slot.

    Args:
        whole: the model's own, behind the last stage and where a stage says nothing.
    """
    stage = stage_at(slot, stages)
    if stage is None:
        return whole
    return Form(stage.image_size or whole.image_size, stage.context_length or whole.context_length)
