"""A remembered denominator, and a temperature of its own for every sample."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.losses.batch import Moment
from diptych.losses.grid import Grid
from diptych.losses.pairs import Tile
from diptych.losses.plugs.denominator.sogclr import averaged, log_mean
from diptych.losses.plugs.family import AnchorSums, Denominator
from diptych.losses.table import SampleTable


@dataclass(frozen=True)
class Isogclr(Denominator, name="isogclr"):
    """As `sogclr`, and each image and each text learns its temperature by descent on a robust objective.

        τ_i · log E_j exp(h_ij / τ_i) + ρ·τ_i,   h_ij = x_ij − x_ii
        d_i = log u_i + ρ − mean_{j≠i} [exp(h_ij / τ_i) / u_i · h_ij / τ_i]
        v_i ← (1−β) v_i + β·clip(d_i, ±5),   τ_i ← clip(τ_i − η v_i, τ_min, τ_max)  after the loss of the step

    Source: arXiv:2305.11965, and the authors' code for the clip and ρ = 8, τ = 0.01, β = 0.9.
    Cost: as `sogclr`, one exponential per direction, and one more reduction over all pairs for the mean.
    Use: long-tailed data, where frequent meanings want a higher temperature than rare ones.
    Verified: dense float64 over several steps, u, v and τ included; η = 0 equals `sogclr` at 1/τ.
    """

    needs: ClassVar[tuple[str, ...]] = ("sample_ids",)
    num_samples: int = 1_000_000
    """Slots of the table."""
    gamma: float = 0.8
    """γ, in (0, 1]."""
    rho: float = 8.0
    """ρ: higher holds temperatures lower."""
    start: float = 0.01
    """τ of a sample that has not been met."""
    minimum: float = 0.005
    """τ_min."""
    maximum: float = 0.05
    """τ_max."""
    step_size: float = 1e-3
    """η."""
    beta: float = 0.9
    """β, the weight of the new gradient, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.start <= self.maximum:
            raise ValueError(f"0 < minimum <= start <= maximum must hold: {self.minimum}, {self.start}, {self.maximum}")
        if not 0 < self.gamma <= 1 or not 0 < self.beta <= 1 or self.num_samples < 1:
            raise ValueError(
                f"gamma and beta must lie in (0, 1] and num_samples be at least 1: {self.gamma}, {self.beta}, "
                f"{self.num_samples}"
            )

    def build(self, embed_dim: int) -> nn.Module:
        """The tables."""
        return PersonalTemperatures(self)


class PersonalTemperatures(nn.Module, Denominator):
    """See `Isogclr`."""

    needs = Isogclr.needs
    drops_own = True
    wants_count = True
    wants_mean_logit = True
    symmetric: ClassVar[bool] = False

    def __init__(self, config: Isogclr) -> None:
        super().__init__()
        self._config = config
        self.image = SampleTable(config.num_samples, (-math.inf, config.start, 0.0))
        self.text = SampleTable(config.num_samples, (-math.inf, config.start, 0.0))

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """Temperatures of all anchors, and logits at these temperatures."""
        image = self.image.look_up(grid.own_of("image")["sample_ids"])[:, 1].to(grid.rows.features.dtype)
        text = self.text.look_up(grid.own_of("text")["sample_ids"])[:, 1].to(grid.rows.features.dtype)
        rows, columns = (image, text) if grid.rows.modality == "image" else (text, image)
        grid = grid.know("temperatures", rows=rows, columns=columns)
        return replace(grid, logits=personal, symmetric_logits=False)

    def losses(self, sums: AnchorSums) -> Float[Tensor, " B"]:
        """As `sogclr`; moves u, v and τ. Every rank of the world must call."""
        config, table = self._config, self.image if sums.anchors.modality == "image" else self.text
        ids = sums.anchors["sample_ids"]
        log_old, temperature, velocity = table.look_up(ids).to(sums.log_sum.dtype).unbind(1)
        log_g, some = log_mean(sums)
        log_u = averaged(log_old, log_g.detach(), config.gamma)
        ratio = (log_g.detach() - log_u).exp()
        assert sums.mean_logit is not None, "asked for by wants_mean_logit"
        slope = log_u + config.rho - ratio * (sums.mean_logit - sums.positive).detach()
        new_velocity = (1 - config.beta) * velocity + config.beta * slope.clamp(-5, 5)
        moved = (temperature - config.step_size * new_velocity).clamp(config.minimum, config.maximum)
        if torch.is_grad_enabled():  # measuring a loss is no visit
            before, after = ((log_old, temperature, velocity), (log_u, moved, new_velocity))
            table.store(ids, torch.where(some[:, None], torch.stack(after, 1), torch.stack(before, 1)))
        return torch.where(some, ratio * log_g * temperature, 0.0)


def personal(tile: Tile) -> Tensor:
    """Similarities over the anchor's own temperature."""
    return tile.similarity / tile.anchor["temperatures"][:, None]
