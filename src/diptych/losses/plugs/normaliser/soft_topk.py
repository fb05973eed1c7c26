"""The positives among the first k, softly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.errors import ConfigError
from diptych.losses.composition import Composition
from diptych.losses.grid import Grid
from diptych.losses.pairs import Direction, Tile
from diptych.losses.plugs.family import Layout
from diptych.losses.plugs.normaliser.family import AnchorLosses, Normaliser, over_targets

_BISECTIONS = 40


@dataclass(frozen=True)
class SoftTopk(Normaliser, name="soft_topk"):
    """Positives should be among an anchor's k best candidates, by a differentiable top-k operator.

        loss_i = −Σ_p π_ip log q_ip,   q_ij = σ(a·(z_ij + t_i)),   t_i such that Σ_j q_ij = k

    t is found by bisection and differentiated implicitly.
    Source: arXiv:2310.10636, soft top-k (a = 2, k = 5, τ = 0.05).
    Cost: some forty reductions without gradient for t, and two with.
    Use: several positives per anchor and a metric at k.
    Verified: dense float64, gradients by autograd through a dense solution; q sums to k.
    """

    k: int = 5
    """How many may be right; below the number of candidates."""
    sharpness: float = 2.0
    """a."""

    def __post_init__(self) -> None:
        if self.k < 1 or not self.sharpness > 0:
            raise ValueError(f"k must be at least 1 and sharpness positive, not {self.k} and {self.sharpness}")

    def losses(self, layout: Layout, plugs: Composition) -> AnchorLosses:
        """Both directions' anchors."""
        candidates = min(layout.grid.num_candidates("rows"), layout.grid.num_candidates("columns"))
        if self.k >= candidates:
            raise ConfigError(f"soft_topk wants k ({self.k}) below the number of candidates ({candidates}) · lower k")
        grid = layout.grid.know("topk_threshold", **self._threshold(layout.grid, plugs))

        def slope(tile: Tile) -> Sequence[Tensor]:
            q = torch.sigmoid(self._argument(tile, plugs).detach())
            return (self.sharpness * q * (1 - q),)

        def total(tile: Tile) -> Sequence[Tensor]:
            return (torch.sigmoid(self._argument(tile, plugs)),)

        def positives(tile: Tile) -> Sequence[Tensor | None]:
            right = plugs.targets(tile)
            if right is None:
                return (None, None)
            loss = -F.logsigmoid(self._argument(tile, plugs))
            return (torch.where(right > 0, right * loss, 0.0), right)

        with torch.no_grad():
            slopes = grid.reduce(slope, ("sum",))
        totals = grid.reduce(total, ("sum",))
        moved = {}
        for direction in grid.directions:
            # One Newton step from the solution: its value changes nothing, its gradient is the implicit one.
            step = (self.k - totals[direction][0]) / slopes[direction][0].clamp(min=1e-12)
            moved[direction] = grid.anchors(direction)["topk_threshold"] + step
        found = grid.know("topk_threshold", **moved).reduce(positives, ("sum", "sum"))
        return over_targets(grid, found)

    @torch.no_grad()
    def _threshold(self, grid: Grid, plugs: Composition) -> dict[Direction, Tensor]:
        """t by bisection between bounds that the log-sum-exps of z and −z give."""
        bounds = grid.reduce(lambda tile: (tile.logits, -tile.logits), ("logsumexp", "logsumexp"))
        low = {d: -bounds[d][0] - 10 / self.sharpness for d in grid.directions}
        high = {d: bounds[d][1] + 10 / self.sharpness for d in grid.directions}
        for _ in range(_BISECTIONS):
            middle = {d: (low[d] + high[d]) / 2 for d in grid.directions}
            known = grid.know("topk_threshold", **middle)
            found = known.reduce(lambda tile: (torch.sigmoid(self._argument(tile, plugs)),), ("sum",))
            for d in grid.directions:
                below = found[d][0] < self.k
                low[d], high[d] = torch.where(below, middle[d], low[d]), torch.where(below, high[d], middle[d])
        return {d: (low[d] + high[d]) / 2 for d in grid.directions}

    def _argument(self, tile: Tile, plugs: Composition) -> Tensor:
        """a·(z + t); -inf where a candidate is dropped."""
        energy = plugs.energy(tile)
        argument = self.sharpness * (tile.logits + tile.anchor["topk_threshold"][:, None])
        return argument if energy is tile.logits else argument.masked_fill(energy == -torch.inf, -torch.inf)
