"""The most similar candidates of every anchor, without storing all pairs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.distributed.collectives import all_gather_rows
from diptych.losses import tiles
from diptych.losses.grid import Grid
from diptych.losses.pairs import Direction, Side, Tile


@dataclass(frozen=True)
class Hardest:
    """The nearest candidates of this rank's anchors, nearest first."""

    similarity: Float[Tensor, "B K"]
    place: Int[Tensor, "B K"]
    """Where among the `candidates`."""
    candidates: Side
    """All there are, without gradient."""


@torch.no_grad()
def hardest(grid: Grid, direction: Direction, count: int, *, allowed: Callable[[Tile], Tensor]) -> Hardest:
    """The `count` most similar allowed candidates of each of this rank's anchors.

    Where fewer are allowed, the rest is -inf. Every rank of the group must call.

    Args:
        allowed: which entries of a tile may be chosen: [R, C] booleans.
    """
    anchors, candidates = grid.anchors(direction), _everyone(grid, direction)
    values = anchors.features.new_full((len(anchors), count), -torch.inf)
    places = torch.zeros((len(anchors), count), dtype=torch.long, device=values.device)
    height, width = tiles.shape_on(values.device)
    for rows in tiles.spans(len(anchors), height):
        for columns in tiles.spans(len(candidates), width):
            tile = grid.tile(anchors.cut(rows), candidates.cut(columns), grid.shared)
            offered = tile.similarity.masked_fill(~allowed(tile), -torch.inf)
            numbers = torch.arange(columns.start, columns.stop, device=values.device).expand_as(offered)
            best = torch.cat([values[rows], offered], 1).topk(count, dim=1)
            values[rows] = best.values
            places[rows] = torch.cat([places[rows], numbers], 1).gather(1, best.indices)
    return Hardest(values, places, candidates)


def _everyone(grid: Grid, direction: Direction) -> Side:
    """All candidates of this rank's anchors: the columns, or the rows of all ranks, without gradient."""
    if direction == "rows":
        return replace(grid.columns, features=grid.columns.features.detach())
    side = grid.rows
    info = {name: all_gather_rows(value, grid.group) for name, value in side.info.items()}
    features, number = all_gather_rows(side.features, grid.group), all_gather_rows(side.number, grid.group)
    return replace(side, features=features, number=number, info=info)
