"""The plugs of one contrastive loss, built and ready to be called on tiles."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import (
    Candidates,
    Denominator,
    Plug,
    SampleWeight,
    Similarity,
    Targets,
    Temperature,
    Weights,
)


@dataclass(frozen=True)
class Composition:
    """See `plugs/family.py` for what each is."""

    similarity: Similarity
    temperature: Temperature
    targets: Targets
    weights: tuple[Weights, ...]
    candidates: tuple[Candidates, ...]
    denominator: Denominator
    sample_weight: SampleWeight
    label_smoothing: float

    def energy(self, tile: Tile) -> Float[Tensor, "R C"]:
        """z + log w."""
        energy = tile.logits
        for weights in self.weights:
            log_weight = weights(tile)
            energy = energy if log_weight is None else energy + log_weight
        for candidates in self.candidates:
            log_weight = candidates.log_weight(tile)
            energy = energy if log_weight is None else energy + log_weight
        if self.denominator.drops_own and tile.has_own():
            energy = energy.masked_fill(tile.own(), -torch.inf)
        return energy

    @property
    def has_weights(self) -> bool:
        """Whether candidates may count differently, or not at all."""
        return bool(self.weights) or bool(self.candidates) or self.denominator.drops_own

    @property
    def has_penalty(self) -> bool:
        """Whether temperatures cost something."""
        return type(self.temperature).penalty is not Temperature.penalty

    @property
    def symmetric(self) -> bool:
        """Whether a pair gives both of its sides the same."""
        plugs: tuple[Plug, ...] = (self.targets, self.temperature, self.denominator, *self.weights)
        return all(plug.symmetric for plug in plugs)

    @property
    def needs(self) -> tuple[str, ...]:
        """What both sides must know, without repetition."""
        single: tuple[Plug, ...] = (self.targets, self.temperature, self.denominator, self.sample_weight)
        plugs: tuple[Plug, ...] = (*single, *self.weights, *self.candidates)
        return tuple(dict.fromkeys(name for plug in plugs for name in plug.needs))
