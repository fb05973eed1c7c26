"""An anchor chooses among its candidates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.composition import Composition
from diptych.losses.grid import Grid, Kind
from diptych.losses.pairs import Direction, Tile
from diptych.losses.plugs.family import AnchorSums, Layout
from diptych.losses.plugs.normaliser.family import AnchorLosses, Normaliser


@dataclass(frozen=True)
class Softmax(Normaliser, name="softmax"):
    """CLIP's loss: cross-entropy of each anchor over its candidates, the mean of both directions.

        loss_i = log Σ_k w_ik exp(z_ik) − Σ_j π_ij z_ij

    Source: arXiv:2103.00020, figure 3.
    Cost: each pair is multiplied once forward, once again and twice in backward; one exponential per pass.
    Use: the default.
    Verified: open_clip's ClipLoss on one and two processes; dense float64 with every plug.
    """

    def losses(self, layout: Layout, plugs: Composition) -> AnchorLosses:
        """Every direction's anchors."""
        sums = _anchor_sums(layout, plugs)
        return {found.anchors.modality: plugs.denominator.losses(found) for found in sums}


def _anchor_sums(layout: Layout, plugs: Composition) -> list[AnchorSums]:
    grid = layout.grid
    fold = _Fold(plugs)
    found = grid.reduce(fold, fold.kinds, symmetric=fold.symmetric)
    sums = []
    for direction in grid.directions:
        values = dict(zip(fold.names, found[direction], strict=True))
        sums.append(_of_anchors(layout, direction, plugs, values))
    if plugs.denominator.wants_mean_logit:
        sums = _with_mean_logits(grid, plugs, sums)
    return sums


def _of_anchors(layout: Layout, direction: Direction, plugs: Composition, values: dict[str, Tensor]) -> AnchorSums:
    grid = layout.grid
    anchors = grid.anchors(direction)
    positive, log_sum, targets = values["positive"], values["log_sum"], values.get("targets")
    local = _Locals.of(layout, direction)
    if local is not None:
        positive, log_sum = positive + local.positive, torch.logaddexp(log_sum, local.log_sum)
        targets = targets + local.targets if targets is not None else None
    positive = positive / targets if targets is not None else positive
    every = anchors.features.new_full((len(anchors),), grid.num_candidates(direction))
    count = values.get("count", every) + (local.count if local is not None else 0)
    if plugs.label_smoothing:
        positive = (1 - plugs.label_smoothing) * positive + plugs.label_smoothing * values["all"] / count.clamp(min=1)
    if "penalty" in values:  # goes where the loss is log_sum − positive
        positive = positive - values["penalty"]
    # An anchor without any candidate has nothing to choose: its loss is 0.
    empty = log_sum == -torch.inf
    log_sum, positive = torch.where(empty, 0.0, log_sum), torch.where(empty, 0.0, positive)
    return AnchorSums(anchors, log_sum, positive, count, None, grid.shared["logit_scale"])


@dataclass(frozen=True)
class _Locals:
    """What candidates of single anchors add to the sums of these."""

    positive: Float[Tensor, " B"]
    targets: Float[Tensor, " B"]
    log_sum: Float[Tensor, " B"]
    count: int

    @classmethod
    def of(cls, layout: Layout, direction: Direction) -> "_Locals | None":
        """None: there are no such candidates."""
        if direction not in layout.local:
            return None
        anchors, local = layout.grid.anchors(direction), layout.local[direction]
        count = local.features.shape[1]
        similarity = torch.einsum("bd,bkd->bk", anchors.features, local.features)
        nobody = replace(anchors, features=local.features[0], number=anchors.number.new_full((count,), -3), info={})
        logits = layout.grid.logits(Tile(similarity, similarity, anchors, nobody, layout.grid.shared))
        return cls((local.targets * logits).sum(1), local.targets.sum(1), torch.logsumexp(logits, 1), count)


def _with_mean_logits(grid: Grid, plugs: Composition, sums: list[AnchorSums]) -> list[AnchorSums]:
    """Adds Σ_k p_ik z_ik, by a second reduction without gradient."""
    by_direction = dict(zip(grid.directions, sums, strict=True))
    log_sums = {direction: found.log_sum.detach() for direction, found in by_direction.items()}
    grid = grid.know("log_sum", **log_sums)

    def fold(tile: Tile) -> Sequence[Tensor | None]:
        energy = plugs.energy(tile)
        return (torch.exp(energy - tile.anchor["log_sum"][:, None]) * tile.logits,)

    with torch.no_grad():
        found = grid.reduce(fold, ("sum",))
    return [replace(of_anchors, mean_logit=found[direction][0]) for direction, of_anchors in by_direction.items()]


class _Fold:
    """What a tile adds to the sums of its anchors."""

    def __init__(self, plugs: Composition) -> None:
        self._plugs = plugs
        counts = plugs.has_weights and (plugs.label_smoothing > 0 or plugs.denominator.wants_count)
        wanted: dict[str, tuple[Kind, bool]] = {
            "positive": ("sum", True),
            "targets": ("sum", plugs.targets.normalise),
            "count": ("sum", counts),
            "all": ("sum", plugs.label_smoothing > 0),
            "penalty": ("sum", plugs.has_penalty),
            "log_sum": ("logsumexp", True),
        }
        self.names = tuple(name for name, (_, needed) in wanted.items() if needed)
        self.kinds = tuple(wanted[name][0] for name in self.names)
        self.symmetric = plugs.symmetric

    def __call__(self, tile: Tile) -> Sequence[Tensor | None]:
        energy, right = self._plugs.energy(tile), self._plugs.targets(tile)
        values: dict[str, Tensor | None] = {
            "positive": None if right is None else right * tile.logits,
            "targets": right,
            "log_sum": energy,
        }
        if "count" in self.names:
            values["count"] = (energy.detach() > -torch.inf).to(energy.dtype)
        if "all" in self.names:
            plain = energy is tile.logits
            values["all"] = energy if plain else tile.logits.masked_fill(energy.detach() == -torch.inf, 0.0)
        if "penalty" in self.names:
            values["penalty"] = self._plugs.temperature.penalty(tile)
        return [values[name] for name in self.names]
