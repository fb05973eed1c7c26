"""The exact contrastive losses on CUDA without the matrix of logits, in O((B + G) D) memory.

                columns [G, D]             The matrix is walked in chunks, a chunk in tiles, a tile by one program.
            +--------------------+
            |  chunk  |          |         statistics   tile of z -> a sum of 2^z per row and per column of the tile,
    rows    | +--+--+ |          |                      which `fold_kernel` log-adds to the running statistics
    [B, D]  | |tile | |          |
            | +--+--+ |          |         gradients    tile of z -> P = dL/dz in the inputs' type, into one buffer
            |---------+          |                      for all chunks; then two cuBLAS products in float32:
            |                    |                      d_rows += P @ columns and d_columns += P^T @ rows
            +--------------------+

A pair is multiplied once forward, once again backward and twice by cuBLAS, 8 B G D operations, and no logit is written.
Logits live in base 2 (the scale carries log2 e), since the hardware's exponential is 2^x.

One exponential serves both directions. Forward it is 2^(z - peak) with the tile's maximum. Its sums stand as long as
none is below 2^-86 = e^-60: what underflows, below e^-87, is then less than float32 resolves. Backward,
P = 2^(z - shift) (row_grad_i 2^(shift - row_lse_i) + col_grad_j 2^(shift - col_lse_j)); statistics bound z from above,
so shift = min(max row_lse, max col_lse) over the tile costs nothing per pair, and stands as long as neither kind spans
more than 86 bits. A tile that breaks its condition takes a second branch with a shift for each row and column. NaN
survives both: every sum contains it, whatever a maximum made of it.

Nothing waits for the device. Tiles are constants, not autotuned: tuning would hold up every rank at the start and let
each choose another order of sums. Float32 inputs are multiplied as 'tf32x3', whose error (2^-21 of a product) is of the
order of float32's own, at 1/6 of the bf16 rate; 'ieee' has no tensor cores and is several times slower still. Their
cuBLAS products follow `torch.backends.cuda.matmul`, as the PyTorch form's do.
"""

# ruff: noqa: PLR0913 - a kernel takes its pointers one by one
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych.losses.kernel_programs import (
    INSTALLED,
    fold_kernel,
    put_kernel,
    sigmoid_pairs_kernel,
    sigmoid_statistics_kernel,
    softmax_pairs_kernel,
    softmax_statistics_kernel,
)
from diptych.losses.tiles import Partner, partner_dots, spans

LOG2_E = 1.4426950408889634

# `addmm` that adds a product of half types to a float32 sum in place (pytorch #167931).
MINIMUM_TORCH = (2, 10)


@dataclass(frozen=True)
class Tiling:
    """How the matrix of pairs is cut; chunks are whole tiles."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    """Share of D multiplied at a time."""
    warps: int = 8
    stages: int = 3
    registers: int | None = 128
    """Per thread. At 128 a Hopper multiprocessor holds two programs, and one's sums hide behind the other's product."""
    group: int = 8
    """Row tiles that walk the columns side by side, so that both operands come from the L2 cache."""
    statistics_chunk: int = 16384
    """Side of a chunk forward: 16 MB of partial sums."""
    gradients_chunk: int = 8192
    """Side of a chunk backward: 128 MB of P in a half type, and a full wave of output tiles for cuBLAS at D = 512."""
    shared_bits: float = 86.0
    """Span that one exponential may serve; inf and -inf force a branch (for tests)."""


HALF = Tiling()
SINGLE = Tiling(depth=32, registers=None)


def is_available(device: torch.device) -> bool:
    """Whether these functions run on `device`."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not INSTALLED or device.type != "cuda" or torch.version.cuda is None or version < MINIMUM_TORCH:
        return False
    # Older cards have no bfloat16 or TF32 products.
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def softmax_statistics(
    rows: Float[Tensor, "B D"], columns: Float[Tensor, "G D"], scale: Float[Tensor, ""], *, tiling: Tiling | None = None
) -> tuple[Float[Tensor, " B"], Float[Tensor, " G"]]:
    """The log-sum-exp of z_ij = scale <rows_i, columns_j> over j and over i, in float32."""
    rows, columns, tiling = _prepare(rows, columns, tiling)
    bits = scale.float() * LOG2_E
    row_lse = rows.new_full(rows.shape[:1], -torch.inf, dtype=torch.float32)
    column_lse = rows.new_full(columns.shape[:1], -torch.inf, dtype=torch.float32)
    height, width = min(tiling.statistics_chunk, len(rows)), min(tiling.statistics_chunk, len(columns))
    down, across = _ceil(height, tiling.rows), _ceil(width, tiling.columns)
    row_sums, column_sums = row_lse.new_empty(across * height), row_lse.new_empty(down * width)
    peaks = row_lse.new_empty(down * across)
    with torch.cuda.device_of(rows):
        for r, c in product(spans(len(rows), height), spans(len(columns), width)):
            sums = (row_sums, column_sums, peaks, 2.0**-tiling.shared_bits)
            _launch(softmax_statistics_kernel, tiling, rows[r], columns[c], bits, *sums)
            down, across = _ceil(len(rows[r]), tiling.rows), _ceil(len(columns[c]), tiling.columns)
            _fold(row_lse[r], row_sums, peaks, across, (1, across), tiling.rows)
            _fold(column_lse[c], column_sums, peaks, down, (across, 1), tiling.columns)
    return row_lse / LOG2_E, column_lse / LOG2_E


def softmax_gradients(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "G D"],
    scale: Float[Tensor, ""],
    row_lse: Float[Tensor, " B"],
    col_lse: Float[Tensor, " G"],
    row_grad: Float[Tensor, " B"],
    col_grad: Float[Tensor, " G"],
    *,
    partner: Partner | None = None,
    tiling: Tiling | None = None,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "G D"]]:
    """d_rows = scale P @ columns and d_columns = scale P^T @ rows, in float32.

        P_ij = row_grad_i exp(z_ij - row_lse_i) + col_grad_j exp(z_ij - col_lse_j)

    Args:
        rows: one side of the pairs.
        columns: the other side.
        scale: multiplies the inner products.
        row_lse: as of `softmax_statistics`, of all these columns or of more.
        col_lse: likewise.
        row_grad: dL/d row_lse.
        col_grad: likewise.
        partner: (j, w): P_{i, j_i} is w_i less (j_i < 0: no partner). Made for the positives: once a pair is learnt its
            P is w (1 - 10^-3), a difference that bfloat16 (2^-9) would round away if it were taken afterwards.
        tiling: None: what suits the type.
    """
    rows, columns, tiling = _prepare(rows, columns, tiling)
    gain = _gain(rows.dtype, [row_grad, col_grad], partner)
    bits = scale.float() * LOG2_E
    row_side = _Side.of(row_lse, row_grad * gain, tiling.rows, tiling.shared_bits)
    column_side = _Side.of(col_lse, col_grad * gain, tiling.columns, tiling.shared_bits)

    def write(r: slice, c: slice, pairs: Tensor) -> None:
        sides = (*row_side.cut(r), *column_side.cut(c))
        _launch(softmax_pairs_kernel, tiling, rows[r], columns[c], bits, *sides, pairs, pairs.stride(0))

    value = None
    if partner is not None:
        at, z = partner[0].clamp_min(0), partner_dots(rows, columns, partner[0]) * bits
        value = row_side.grad * torch.exp2(z - row_side.lse) - partner[1] * gain
        value += column_side.grad[at] * torch.exp2(z - column_side.lse[at])
    d_rows, d_columns = _multiply_pairs(rows, columns, tiling, write, partner and (partner[0], value))
    return d_rows.mul_(scale / gain), d_columns.mul_(scale / gain)


def sigmoid_statistics(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "G D"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    *,
    tiling: Tiling | None = None,
) -> Float[Tensor, " B"]:
    """The sum over j of softplus(z_ij + bias), in float32."""
    rows, columns, tiling = _prepare(rows, columns, tiling)
    bits, bias = scale.float() * LOG2_E, bias.float() * LOG2_E
    total = rows.new_zeros(rows.shape[:1], dtype=torch.float32)
    height, width = min(tiling.statistics_chunk, len(rows)), min(tiling.statistics_chunk, len(columns))
    sums = total.new_empty(_ceil(width, tiling.columns) * height)
    with torch.cuda.device_of(rows):
        for r, c in product(spans(len(rows), height), spans(len(columns), width)):
            _launch(sigmoid_statistics_kernel, tiling, rows[r], columns[c], bits, bias, sums)
            across = _ceil(len(columns[c]), tiling.columns)
            total[r] += sums[: across * len(rows[r])].view(across, -1).sum(0)
    # softplus(-inf) = 0: a row of infinities must not look like a perfect one
    return total / LOG2_E + 0 * (total + _spoilt(rows))


def sigmoid_gradients(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "G D"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    row_grad: Float[Tensor, " B"],
    *,
    partner: Partner | None = None,
    tiling: Tiling | None = None,
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "G D"], Float[Tensor, ""]]:
    """d_rows and d_columns as in `softmax_gradients` (see `partner` there), and d_bias, the sum of P.

    P_ij = row_grad_i sigmoid(z_ij + bias)
    """
    rows, columns, tiling = _prepare(rows, columns, tiling)
    gain = _gain(rows.dtype, [row_grad], partner)
    weight = row_grad * gain + _spoilt(rows)  # sigmoid(inf) is finite
    bits, bias = scale.float() * LOG2_E, bias.float() * LOG2_E
    side = tiling.gradients_chunk
    programs = _ceil(min(side, len(rows)), tiling.rows) * _ceil(min(side, len(columns)), tiling.columns)
    totals = rows.new_zeros(programs, dtype=torch.float32)

    def write(r: slice, c: slice, pairs: Tensor) -> None:
        arguments = (bits, bias, weight[r], pairs, pairs.stride(0), totals)
        _launch(sigmoid_pairs_kernel, tiling, rows[r], columns[c], *arguments)

    value, taken = None, weight.new_zeros(())
    if partner is not None:
        z = partner_dots(rows, columns, partner[0]) * bits + bias
        value = weight / (1 + torch.exp2(-z)) - partner[1] * gain
        taken = torch.where(partner[0] >= 0, partner[1], 0).sum()
    d_rows, d_columns = _multiply_pairs(rows, columns, tiling, write, partner and (partner[0], value))
    d_columns += _spoilt(columns)[:, None]
    return d_rows.mul_(scale / gain), d_columns.mul_(scale / gain), totals.sum() / gain - taken


def _prepare(rows: Tensor, columns: Tensor, tiling: Tiling | None) -> tuple[Tensor, Tensor, Tiling]:
    if rows.dtype != columns.dtype or rows.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"rows ({rows.dtype}) and columns ({columns.dtype}) must share bfloat16, float16 or float32")
    return rows.contiguous(), columns.contiguous(), tiling or (SINGLE if rows.dtype == torch.float32 else HALF)


def _ceil(length: int, tile: int) -> int:
    return -(-length // tile)


def _spoilt(features: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """0 for a finite row, NaN for another."""
    return 0 * features.sum(1, dtype=torch.float32)


def _gain(dtype: torch.dtype, grads: list[Tensor], partner: Partner | None) -> Float[Tensor, ""]:
    """The factor that P carries: in float16 2^14 / max |grad|, so that |P| < 2^16 and 10^-9 of the largest is normal.

    Of a mean over 10^6 rows, all of P would lie below float16's 6e-8. bfloat16 and float32 have the range.
    """
    if dtype != torch.float16:
        return grads[0].new_ones((), dtype=torch.float32)
    largest = [grad.float().abs().amax() for grad in (*grads, *(partner or ())[1:])]
    return 2.0**14 / torch.stack(largest).amax().clamp_min(1e-30)


@dataclass(frozen=True)
class _Side:
    """What P takes from the rows, or from the columns."""

    tile: int
    lse: Tensor
    """In base 2."""
    grad: Tensor
    weight: Tensor
    """grad 2^(top - lse)."""
    top: Tensor
    """The largest statistic of each tile; NaN: they span too much for one exponential."""

    @classmethod
    def of(cls, lse: Tensor, grad: Tensor, tile: int, shared_bits: float) -> Self:
        lse, grad = lse.float() * LOG2_E, grad.float()
        padding = (0, -len(lse) % tile)
        top = F.pad(lse, padding, value=-torch.inf).view(-1, tile).amax(1)
        bottom = F.pad(lse, padding, value=torch.inf).view(-1, tile).amin(1)
        weight = grad * torch.exp2(top.repeat_interleave(tile)[: len(lse)] - lse)
        return cls(tile, lse, grad, weight, torch.where(top - bottom <= shared_bits, top, torch.nan))

    def cut(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lse[chunk], self.grad[chunk], self.weight[chunk], self.top[chunk.start // self.tile :]


def _multiply_pairs(
    rows: Tensor, columns: Tensor, tiling: Tiling, write: Callable[[slice, slice, Tensor], None], partner: Any
) -> tuple[Tensor, Tensor]:
    """P @ columns and P^T @ rows, where `write` fills one chunk of P after another, but for the partners' values."""
    height, width = min(tiling.gradients_chunk, len(rows)), min(tiling.gradients_chunk, len(columns))
    d_rows, d_columns = torch.zeros_like(rows, dtype=torch.float32), torch.zeros_like(columns, dtype=torch.float32)
    # Rows of P begin at 128 bytes, or cuBLAS would take a kernel for unaligned matrices.
    pitch = _ceil(width, 64) * 64
    buffer = rows.new_empty(height, pitch)
    with torch.cuda.device_of(rows):
        for r, c in product(spans(len(rows), height), spans(len(columns), width)):
            pairs = buffer[: len(rows[r]), : len(columns[c])]
            write(r, c, pairs)
            if partner is not None:
                grid, wanted = (_ceil(len(pairs), 128),), (partner[0][r], partner[1][r], c.start)
                put_kernel[grid](pairs, pitch, *pairs.shape, *wanted, WIDTH=128)
            _accumulate(d_rows[r], pairs, columns[c])
            _accumulate(d_columns[c], pairs.t(), rows[r])
    return d_rows, d_columns


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total` in float32, in place."""
    if right.dtype == torch.float32 or not right.is_cuda:
        total.addmm_(left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _launch(kernel: Any, tiling: Tiling, rows: Tensor, columns: Tensor, *arguments: Any) -> None:
    """One program for each tile of the chunk rows x columns."""
    (num_rows, depth), num_columns = rows.shape, len(columns)
    shape = {"ROWS": tiling.rows, "COLUMNS": tiling.columns, "DEPTH": tiling.depth, "GROUP": tiling.group}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "maxnreg": tiling.registers}
    grid = (_ceil(num_rows, tiling.rows) * _ceil(num_columns, tiling.columns),)
    even = depth % tiling.depth == 0
    kernel[grid](rows, columns, num_rows, num_columns, depth, *arguments, **shape, EVEN=even, **options)


def _fold(running: Tensor, sums: Tensor, peaks: Tensor, count: int, strides: tuple[int, int], tile: int) -> None:
    """Log-adds `count` sums of each entry to the running statistics."""
    grid = (_ceil(len(running), 64),)
    fold_kernel[grid](running, sums, peaks, count, len(running), *strides, TILE=tile, COUNT=32, WIDTH=64)
