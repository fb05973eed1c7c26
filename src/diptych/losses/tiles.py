"""Sums over all pairs without storing the pairs: plain PyTorch, any device, any dtype.

    z_ij = scale · ⟨row_i, column_j⟩            [B, G], never whole

             columns ──►                          forward   a tile of z is made, folded into the statistics of its rows
           ┌────┬────┬────┐                                and of its columns, and dropped
    rows   │ z  │    │    │ ─► row statistics    backward  the tile is made again, turned into gradients P of its
      │    ├────┼────┼────┤    [B]                         entries, and multiplied with both sides: each pair is
      ▼    │    │    │    │                                multiplied once forward, once again, and twice for gradients
           └────┴────┴────┘
              │
              ▼ column statistics [G]

One exponential per element and pass serves both directions. It is taken relative to the tile's maximum, which is exact
as long as no row and no column of the tile lies further than `SAFE_NATS` below that maximum: what then underflows is
smaller than e^-27 of its own sum. Tiles that spread further (large scales, adversarial features) take one exponential
per direction. `kernel.py` has the same four functions for CUDA.

Products and sums are float32 for float32, bfloat16 and float16 features, float64 for float64. A feature that is not
finite makes the statistics of its pairs NaN or infinite, never a finite number.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

ROW_BLOCK, COLUMN_BLOCK = 512, 2048
"""Largest tile: 4 MiB in float32, so that the passes over it stay in the processor's cache."""
_ON_ACCELERATORS = 4
"""Both sides are that much longer there: 64 MiB, for few and large launches."""
Partner = tuple[Int[Tensor, " B"], Float[Tensor, " B"]]
SAFE_NATS = 60.0
"""e^-60 is far from underflow and e^60 far from overflow in float32 (e^±87)."""


class Blocks(NamedTuple):
    """Where a tile lies."""

    rows: slice
    columns: slice


def spans(length: int, size: int) -> Iterator[slice]:
    """Pieces of at most `size`, in order."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def shape_on(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile, at most."""
    factor = 1 if device.type == "cpu" else _ON_ACCELERATORS
    return ROW_BLOCK * factor, COLUMN_BLOCK * factor


def row_spans(features: Tensor) -> Iterator[slice]:
    """Pieces as high as a tile: what is computed row by row needs no more memory than a tile."""
    return spans(len(features), shape_on(features.device)[0])


def partner_dots(
    rows: Float[Tensor, "B D"], columns: Float[Tensor, "G D"], partner: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """⟨row_i, column of its partner⟩; where partner is negative, of any column."""
    dtype = accumulation_dtype(rows)
    dots = [
        torch.linalg.vecdot(rows[at].to(dtype), columns[partner[at].clamp(min=0)].to(dtype)) for at in row_spans(rows)
    ]
    return torch.cat(dots)


def accumulation_dtype(features: Tensor) -> torch.dtype:
    """Float64 for float64, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


# --- softmax --------------------------------------------------------------------------------------------------------


def softmax_statistics(
    rows: Float[Tensor, "B D"], columns: Float[Tensor, "G D"], scale: Float[Tensor, ""]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " G"]]:
    """The log-sum-exp of each row and of each column of z."""
    products = _Products(rows, columns, scale)
    row_lse = products.vector(len(rows), -torch.inf)
    column_lse = products.vector(len(columns), -torch.inf)
    for at in products.blocks():
        row_part, column_part = logsumexp_both_ways(products.logits(at))
        torch.logaddexp(row_lse[at.rows], row_part, out=row_lse[at.rows])
        torch.logaddexp(column_lse[at.columns], column_part, out=column_lse[at.columns])
    return row_lse, column_lse


def logsumexp_both_ways(tile: Float[Tensor, "R C"]) -> tuple[Float[Tensor, " R"], Float[Tensor, " C"]]:
    """Log-sum-exp over the columns and over the rows of a tile, which is overwritten."""
    if tile.is_cuda:  # to look at the maxima would be a synchronisation, and exponentials are cheap there
        return torch.logsumexp(tile, 1), torch.logsumexp(tile, 0)
    row_max, column_max = tile.amax(1), tile.amax(0)
    shift = row_max.amax()
    if shift - torch.minimum(row_max.amin(), column_max.amin()) <= SAFE_NATS:
        powers = tile.sub_(shift).exp_()
        return powers.sum(1).log_().add_(shift), powers.sum(0).log_().add_(shift)
    return torch.logsumexp(tile, 1), torch.logsumexp(tile, 0)


def softmax_gradients(  # noqa: PLR0913 - one tensor per symbol of the formula
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "G D"],
    scale: Float[Tensor, ""],
    row_lse: Float[Tensor, " B"],
    column_lse: Float[Tensor, " G"],
    row_grad: Float[Tensor, " B"],
    column_grad: Float[Tensor, " G"],
    *,
    partner: Partner | None = None,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "G D"]]:
    """Gradients with respect to both sides, given those of the statistics.

        P_ij = row_grad_i · exp(z_ij − row_lse_i) + column_grad_j · exp(z_ij − column_lse_j)
        d_rows = scale · P @ columns,   d_columns = scale · Pᵀ @ rows

    The statistics may be those of a larger matrix of which this one is a part.

    Args:
        partner: (j, w): P of row i with column j_i is w_i less; j_i < 0: no partner.
    """
    products = _Products(rows, columns, scale)
    products.start_gradients()
    spare = products.tile_buffer()
    for at in products.blocks():
        tile = products.logits(at)
        factors = spare[: tile.numel()].view_as(tile)
        lse, grad = (row_lse[at.rows], column_lse[at.columns]), (row_grad[at.rows], column_grad[at.columns])
        products.backward(at, _softmax_tile(tile, factors, lse, grad))
    return products.gradients(partner)


def _softmax_tile(tile: Tensor, factors: Tensor, lse: tuple[Tensor, Tensor], grad: tuple[Tensor, Tensor]) -> Tensor:
    """P of one tile, made in its place; `factors` is memory of the same shape."""
    (row_lse, column_lse), (row_grad, column_grad) = lse, grad
    # No z of the tile is above its row's or its column's statistic, so this bounds the tile without looking at it.
    shift = torch.minimum(row_lse.amax(), column_lse.amax())
    if shift - torch.minimum(row_lse.amin(), column_lse.amin()) <= SAFE_NATS:
        row_factor, column_factor = row_grad * (shift - row_lse).exp(), column_grad * (shift - column_lse).exp()
        torch.add(row_factor[:, None], column_factor[None, :], out=factors)
        return tile.sub_(shift).exp_().mul_(factors)
    torch.sub(tile, column_lse[None, :], out=factors).exp_().mul_(column_grad[None, :])
    return tile.sub_(row_lse[:, None]).exp_().mul_(row_grad[:, None]).add_(factors)


# --- sigmoid --------------------------------------------------------------------------------------------------------


def sigmoid_statistics(
    rows: Float[Tensor, "B D"], columns: Float[Tensor, "G D"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> Float[Tensor, " B"]:
    """Σ_j softplus(z_ij + bias) of each row: the loss of every pair as if it were a negative one."""
    products = _Products(rows, columns, scale)
    row_sum = products.vector(len(rows), 0.0)
    for at in products.blocks():
        row_sum[at.rows] += -F.logsigmoid(products.logits(at).add_(bias).neg_()).sum(1)
    return row_sum


def sigmoid_gradients(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "G D"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    row_grad: Float[Tensor, " B"],
    *,
    partner: Partner | None = None,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "G D"], Float[Tensor, ""]]:
    """Gradients with respect to rows, columns and bias, with P_ij = row_grad_i · σ(z_ij + bias); `partner` as above."""
    products = _Products(rows, columns, scale)
    products.start_gradients()
    d_bias = products.vector(1, 0.0)
    for at in products.blocks():
        tile = products.logits(at).add_(bias).sigmoid_().mul_(row_grad[at.rows, None])
        d_bias += tile.sum()
        products.backward(at, tile)
    if partner is not None:
        d_bias -= torch.where(partner[0] < 0, 0.0, partner[1]).sum()
    d_rows, d_columns = products.gradients(partner)
    return d_rows, d_columns, d_bias[0]


# --- products -------------------------------------------------------------------------------------------------------


class _Products:
    """Makes tiles of z in one reused buffer, and multiplies tiles of gradients back."""

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor) -> None:
        self._dtype = accumulation_dtype(rows)
        self._rows, self._columns = rows, columns
        self._scale = scale.to(self._dtype)
        self._buffer = self.tile_buffer()

    def start_gradients(self) -> None:
        """Begins to add up gradients of both sides."""
        self._d_rows = torch.zeros_like(self._rows, dtype=self._dtype)
        self._d_columns = torch.zeros_like(self._columns, dtype=self._dtype)

    def vector(self, length: int, value: float) -> Tensor:
        """A new vector of one value."""
        return torch.full((length,), value, dtype=self._dtype, device=self._rows.device)

    def tile_buffer(self) -> Tensor:
        """Memory for one tile."""
        height, width = shape_on(self._rows.device)
        size = min(len(self._rows), height) * min(len(self._columns), width)
        return torch.empty(size, dtype=self._dtype, device=self._rows.device)

    def blocks(self) -> Iterator[Blocks]:
        """All tiles, row by row."""
        height, width = shape_on(self._rows.device)
        for rows in spans(len(self._rows), height):
            for columns in spans(len(self._columns), width):
                yield Blocks(rows, columns)

    def logits(self, at: Blocks) -> Float[Tensor, "R C"]:
        """A tile of z; the next call overwrites it."""
        rows = self._rows[at.rows].to(self._dtype) * self._scale
        columns = self._columns[at.columns].to(self._dtype)
        tile = self._buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
        return torch.mm(rows, columns.T, out=tile)

    def backward(self, at: Blocks, gradient: Float[Tensor, "R C"]) -> None:
        """Adds what a tile of gradients gives to both sides."""
        self._d_rows[at.rows].addmm_(gradient, self._columns[at.columns].to(self._dtype))
        self._d_columns[at.columns].addmm_(gradient.T, self._rows[at.rows].to(self._dtype))

    def gradients(self, partner: Partner | None) -> tuple[Tensor, Tensor]:
        """What has been added up, for both sides, and what partners take from it."""
        if partner is not None:
            for at in row_spans(self._rows):
                self._take(at, partner[0][at], partner[1][at])
        return self._d_rows.mul_(self._scale), self._d_columns.mul_(self._scale)

    def _take(self, at: slice, place: Tensor, amount: Tensor) -> None:
        amount = torch.where(place < 0, 0.0, amount.to(self._dtype))[:, None]
        place = place.clamp(min=0)
        self._d_rows[at] -= amount * self._columns[place].to(self._dtype)
        self._d_columns.index_add_(0, place, amount * self._rows[at].to(self._dtype), alpha=-1)
