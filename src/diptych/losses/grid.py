"""Any reduction over all pairs, tile by tile: the engine below every plug.

A *fold* is a function of a tile that returns tensors of the tile's shape; `reduce` folds each of them over the
candidates of every anchor, by sum or by log-sum-exp, for the rows as anchors, for the columns, or for both. The result
is differentiable with respect to everything a tile is made of, and made again in backward instead of being kept, so
memory is O((B + G)·D) whatever the fold does inside a tile. Folds compose: what one reduction finds of an anchor (a
normaliser, a threshold) is attached to its side with `Grid.know`, and the next reduction's tiles see it.

In a group of ranks the rows are this rank's own and the columns those of all: sums of rows are local, sums of columns
are merged over the ranks, and each rank keeps those of its own pairs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from diptych.distributed.collectives import all_gather, merge
from diptych.distributed.groups import ALONE, Group
from diptych.losses import tiles
from diptych.losses.pairs import Direction, Modality, Side, Tile
from diptych.losses.tiles import SAFE_NATS, Blocks

Kind = Literal["sum", "logsumexp"]
Fold = Callable[[Tile], Sequence[Tensor | None]]
"""One tensor per kind, of the tile's shape; None: nothing in this tile."""


class Similarity(Protocol):
    """How alike rows and columns are: [R, C]."""

    def __call__(self, rows: Side, columns: Side, shared: Mapping[str, Tensor]) -> Tensor: ...


class Logits(Protocol):
    """Logits of a tile whose `logits` are still its similarities, as its anchors see them."""

    def __call__(self, tile: Tile) -> Tensor: ...


def dot(rows: Side, columns: Side, shared: Mapping[str, Tensor]) -> Float[Tensor, "R C"]:
    """Cosines of unit-norm features."""
    return rows.features @ columns.features.T


def scaled(tile: Tile) -> Float[Tensor, "R C"]:
    """Similarities times one logit_scale for all."""
    return tile.similarity * tile.shared["logit_scale"]


Anchored = Mapping[Direction, tuple[Float[Tensor, " B"], ...]]
"""What was found of every anchor, by kind: of this rank's rows, of this rank's columns, where these were asked for."""


@dataclass(frozen=True)
class Grid:
    """The matrix of all pairs, which is never stored."""

    rows: Side
    """This rank's own."""
    columns: Side
    """Those of all ranks of the group, in rank order, then extra candidates."""
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    group: Group = ALONE
    directions: tuple[Direction, ...] = ("rows", "columns")
    """Whose anchors are looked at."""
    similarity: Similarity = dot
    logits: Logits = scaled
    symmetric_logits: bool = True
    """Whether a pair has one logit, whichever of the two is the anchor."""

    def reduce(self, fold: Fold, kinds: tuple[Kind, ...], *, symmetric: bool = False) -> Anchored:
        """Folds tiles into one vector per kind and direction. Every rank of the group must call.

        Args:
            fold: see above; called for the rows as anchors and, flipped, for the columns.
            kinds: how each of its tensors is folded.
            symmetric: the fold gives a pair the same value from both sides; it is then called once for both, and one
                exponential serves both.
        """
        tensors, spec = _pack(self, fold, kinds, symmetric=symmetric and self.symmetric_logits)
        found = list(_Reduce.apply(spec, *tensors))
        by_direction: dict[Direction, tuple[Tensor, ...]] = {}
        if "rows" in self.directions:
            by_direction["rows"] = tuple(found.pop(0) for _ in kinds)
        if "columns" in self.directions:
            by_direction["columns"] = tuple(merge(found.pop(0), kind, self.group) for kind in kinds)
        return by_direction

    def know(self, name: str, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Self:
        """The same with something more known of the anchors; `columns` are this rank's own [B, ...] and are gathered.

        Candidates that are no anchors get zeros. Every rank of the group must call.
        """
        grid = self
        if rows is not None:
            grid = replace(grid, rows=grid.rows.know(**{name: _padded(rows, len(self.rows))}))
        if columns is not None:
            everyone = all_gather(columns, self.group)
            grid = replace(grid, columns=grid.columns.know(**{name: _padded(everyone, len(self.columns))}))
        return grid

    def anchors(self, direction: Direction) -> Side:
        """This rank's own rows, or its own columns, in the order of its pairs."""
        if direction == "rows":
            return self.rows.cut(slice(0, self.rows.num_anchors))
        count = self.columns.num_anchors // self.group.size
        return self.columns.cut(slice(self.group.rank * count, (self.group.rank + 1) * count))

    def num_candidates(self, direction: Direction) -> int:
        """Candidates of an anchor, those of all ranks and those that are no anchors included."""
        return len(self.columns) if direction == "rows" else len(self.rows) * self.group.size

    def own_of(self, modality: Modality) -> Side:
        """This rank's own images, or its own texts."""
        return self.anchors("rows" if self.rows.modality == modality else "columns")

    def share(self, **tensors: Tensor) -> Self:
        """The same with more tensors that belong to no row and no column."""
        return replace(self, shared={**self.shared, **tensors})

    def blocks(self) -> Iterator[Blocks]:
        """Places of all tiles; none mixes anchors with other candidates, and none lies where nobody is an anchor."""
        height, width = tiles.shape_on(self.rows.features.device)
        for rows in _spans(self.rows, height):
            for columns in _spans(self.columns, width):
                if rows.start < self.rows.num_anchors or columns.start < self.columns.num_anchors:
                    yield Blocks(rows, columns)

    def tile(self, rows: Side, columns: Side, shared: Mapping[str, Tensor]) -> Tile:
        """A block, seen from the rows."""
        similarity = self.similarity(rows, columns, shared)
        bare = Tile(similarity, similarity, rows, columns, shared)
        return replace(bare, logits=self.logits(bare))

    def flip(self, tile: Tile) -> Tile:
        """The same block seen from the columns."""
        return tile.flipped(None if self.symmetric_logits else self.logits(tile.flipped(tile.similarity.T)))


def _padded(values: Tensor, length: int) -> Tensor:
    if len(values) == length:
        return values
    return torch.cat([values, values.new_zeros((length - len(values), *values.shape[1:]))])


def _spans(side: Side, size: int) -> Iterator[slice]:
    yield from tiles.spans(side.num_anchors, size)
    for rest in tiles.spans(len(side) - side.num_anchors, size):
        yield slice(side.num_anchors + rest.start, side.num_anchors + rest.stop)


# --- differentiation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spec:
    """How to make a grid again from its tensors, and what to do with its tiles."""

    grid: Grid
    names: tuple[tuple[str, str], ...]
    """Owner and name of each tensor."""
    fold: Fold
    kinds: tuple[Kind, ...]
    symmetric: bool

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Whose anchors, in the order of the results."""
        return tuple(direction for direction in ("rows", "columns") if direction in self.grid.directions)

    def values(self, tile: Tile) -> dict[Direction, Sequence[Tensor | None]]:
        """The fold's tensors by direction, each [R, C] as the rows see it."""
        present = self._present(tile)
        if self.symmetric and len(present) == 2:
            return dict.fromkeys(present, self.fold(tile))
        found: dict[Direction, Sequence[Tensor | None]] = {}
        for direction in present:
            if direction == "rows":
                found["rows"] = self.fold(tile)
            else:
                found["columns"] = [None if value is None else value.T for value in self.fold(self.grid.flip(tile))]
        return found

    def _present(self, tile: Tile) -> list[Direction]:
        anchors = {"rows": tile.anchor.num_anchors, "columns": tile.candidate.num_anchors}
        return [direction for direction in self.directions if anchors[direction]]


def _pack(grid: Grid, fold: Fold, kinds: tuple[Kind, ...], *, symmetric: bool) -> tuple[list[Tensor], _Spec]:
    """Every tensor of a grid in one list, as autograd wants them."""
    named: list[tuple[tuple[str, str], Tensor]] = []
    for owner, side in (("rows", grid.rows), ("columns", grid.columns)):
        named += [((owner, ""), side.features), *(((owner, name), value) for name, value in side.info.items())]
    named += [(("shared", name), value) for name, value in grid.shared.items()]
    spec = _Spec(grid, tuple(name for name, _ in named), fold, kinds, symmetric)
    return [tensor for _, tensor in named], spec


def _unpacked(spec: _Spec, tensors: Sequence[Tensor], at: Blocks) -> tuple[Tile, list[Tensor]]:
    """A tile made from cut tensors, and these as leaves, so that gradients of the tile can be asked for."""
    cuts = {"rows": at.rows, "columns": at.columns, "shared": slice(None)}
    leaves = [
        (tensor if owner == "shared" else tensor[cuts[owner]]).detach().requires_grad_(tensor.requires_grad)
        for (owner, _), tensor in zip(spec.names, tensors, strict=True)
    ]
    by_name = dict(zip(spec.names, leaves, strict=True))
    sides = []
    for owner, side in (("rows", spec.grid.rows), ("columns", spec.grid.columns)):
        info = {name: by_name[owner, name] for name in side.info}
        part = side.cut(cuts[owner])
        sides.append(replace(part, features=by_name[owner, ""], info=info))
    shared = {name: by_name["shared", name] for name in spec.grid.shared}
    return spec.grid.tile(sides[0], sides[1], shared), leaves


class _Reduce(torch.autograd.Function):
    """Tiles are made and folded; made again and differentiated, one by one, in backward."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(tensors[0].device.type, enabled=False):
            sums = _Sums(spec)
            for at in spec.grid.blocks():
                tile, _ = _unpacked(spec, tensors, at)
                sums.add(at, spec.values(tile))
        outputs = sums.in_order()
        ctx.spec = spec
        ctx.save_for_backward(*tensors, *outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        spec: _Spec = ctx.spec
        count = len(spec.names)
        tensors, outputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        wanted = zip(tensors, ctx.needs_input_grad[1:], strict=True)
        totals = [torch.zeros_like(t) if needed else None for t, needed in wanted]
        vectors = _Vectors(spec, outputs, gradients)
        with torch.autocast(tensors[0].device.type, enabled=False):
            for at in spec.grid.blocks():
                _add_tile_gradients(spec, at, tensors, totals, vectors)
        return None, *totals


def _add_tile_gradients(
    spec: _Spec, at: Blocks, tensors: Sequence[Tensor], totals: Sequence[Tensor | None], vectors: "_Vectors"
) -> None:
    needed = [tensor.detach().requires_grad_(total is not None) for tensor, total in zip(tensors, totals, strict=True)]
    with torch.enable_grad():
        tile, leaves = _unpacked(spec, needed, at)
        values = spec.values(tile)
    outputs, output_gradients = vectors.of_tile(at, values)
    wanted = [index for index, total in enumerate(totals) if total is not None]
    if not outputs or not wanted:
        return
    found = torch.autograd.grad(outputs, [leaves[index] for index in wanted], output_gradients, allow_unused=True)
    for index, gradient in zip(wanted, found, strict=True):
        total, owner = totals[index], spec.names[index][0]
        if gradient is not None and total is not None:
            place = {"rows": total[at.rows], "columns": total[at.columns]}.get(owner, total) if total.ndim else total
            place += gradient


class _Sums:
    """Running statistics of all anchors."""

    def __init__(self, spec: _Spec) -> None:
        self._spec = spec
        grid = spec.grid
        lengths = {"rows": grid.rows.num_anchors, "columns": grid.columns.num_anchors}
        empty = grid.rows.features.new_empty
        self._by_direction = {
            direction: [
                empty(lengths[direction]).fill_(-torch.inf if kind == "logsumexp" else 0.0) for kind in spec.kinds
            ]
            for direction in spec.directions
        }

    def add(self, at: Blocks, values: dict[Direction, Sequence[Tensor | None]]) -> None:
        """Folds one tile."""
        for number, kind in enumerate(self._spec.kinds):
            tensors = {direction: found[number] for direction, found in values.items()}
            for direction, part in _folded(kind, tensors).items():
                total = self._by_direction[direction][number][at.rows if direction == "rows" else at.columns]
                if kind == "sum":
                    total += part
                else:
                    torch.logaddexp(total, part, out=total)

    def in_order(self) -> tuple[Tensor, ...]:
        """Rows before columns, kinds in order."""
        return tuple(total for direction in self._spec.directions for total in self._by_direction[direction])


def _folded(kind: Kind, tensors: dict[Direction, Tensor | None]) -> dict[Direction, Tensor]:
    """One tile's share of the statistics of its rows and of its columns."""
    axes: dict[Direction, int] = {"rows": 1, "columns": 0}
    if kind == "sum":
        return {direction: value.sum(axes[direction]) for direction, value in tensors.items() if value is not None}
    rows, columns = tensors.get("rows"), tensors.get("columns")
    if rows is not None and rows is columns:
        row_part, column_part = tiles.logsumexp_both_ways(rows.clone())
        return {"rows": row_part, "columns": column_part}
    return {
        direction: torch.logsumexp(value, axes[direction]) for direction, value in tensors.items() if value is not None
    }


class _Vectors:
    """Statistics and their gradients, turned into gradients of a tile's entries."""

    def __init__(self, spec: _Spec, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self._spec = spec
        places = [(direction, number) for direction in spec.directions for number in range(len(spec.kinds))]
        # An anchor without any candidate has lse -inf; every entry of it is -inf too, and exp(-inf - 0) is the right 0.
        finite = [torch.where(output == -torch.inf, 0.0, output) for output in outputs]
        self._lse = dict(zip(places, finite, strict=True))
        self._gradient = dict(zip(places, gradients, strict=True))

    def of_tile(
        self, at: Blocks, values: dict[Direction, Sequence[Tensor | None]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The tile's tensors that can be differentiated, and the gradient of each."""
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for number, kind in enumerate(self._spec.kinds):
            tensors = {direction: found[number] for direction, found in values.items()}
            rows, columns = tensors.get("rows"), tensors.get("columns")
            if rows is not None and rows is columns:
                if rows.requires_grad:
                    outputs.append(rows)
                    gradients.append(self._both(at, number, kind, rows.detach()))
                continue
            for direction, value in tensors.items():
                if value is not None and value.requires_grad:
                    outputs.append(value)
                    gradients.append(self._one(at, number, kind, direction, value.detach()))
        return outputs, gradients

    def _cut(self, at: Blocks, number: int, direction: Direction) -> tuple[Tensor, Tensor]:
        """Statistic and gradient, as a column for the rows and as a row for the columns."""
        place = at.rows if direction == "rows" else at.columns
        axis = 1 if direction == "rows" else 0
        lse, gradient = self._lse[direction, number][place], self._gradient[direction, number][place]
        return lse.unsqueeze(axis), gradient.unsqueeze(axis)

    def _one(self, at: Blocks, number: int, kind: Kind, direction: Direction, value: Tensor) -> Tensor:
        lse, gradient = self._cut(at, number, direction)
        return gradient.expand_as(value) if kind == "sum" else (value - lse).exp_().mul_(gradient)

    def _both(self, at: Blocks, number: int, kind: Kind, value: Tensor) -> Tensor:
        (row_lse, row), (column_lse, column) = self._cut(at, number, "rows"), self._cut(at, number, "columns")
        if kind == "sum":
            return row + column
        shift = torch.minimum(row_lse.amax(), column_lse.amax())  # bounds the tile, as in `tiles.softmax_gradients`
        spread = shift - torch.minimum(row_lse.amin(), column_lse.amin())
        # On CUDA to look at it would be a synchronisation, and exponentials are cheap.
        if not value.is_cuda and spread <= SAFE_NATS:
            return (value - shift).exp_().mul_(row * (shift - row_lse).exp() + column * (shift - column_lse).exp())
        return (value - row_lse).exp_().mul_(row) + (value - column_lse).exp_().mul_(column)
