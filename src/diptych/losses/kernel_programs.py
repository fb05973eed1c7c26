"""The Triton programs of `kernel.py`, one tile of the matrix of pairs each. Logits are in base 2."""

# ruff: noqa: PLR0913 - a kernel takes its pointers one by one
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ModuleNotFoundError:
    triton = None
    constexpr = int

INSTALLED = triton is not None

# Inside a kernel: a pointer, a number or a tile. Quoted there, since Triton looks annotations up.
V = Any


def _jit(function: Callable[..., Any]) -> Any:
    """A Triton kernel; without Triton the plain function, which nobody calls.

    The sizes of a chunk are not specialised, or the ragged last one would compile everything again.
    """
    if triton is None:
        return function
    return triton.jit(
        function, do_not_specialize=["num_rows", "num_columns", "count", "length", "by_sum", "by_tile", "first"]
    )


@_jit
def _place(num_rows: "V", num_columns: "V", ROWS: constexpr, COLUMNS: constexpr, GROUP: constexpr) -> Any:
    """This program's tile: row of tiles, column of tiles, its rows and its columns."""
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    first = tl.program_id(0) // (GROUP * column_tiles) * GROUP
    within = tl.program_id(0) % (GROUP * column_tiles)
    height = tl.minimum(tl.cdiv(num_rows, ROWS) - first, GROUP)
    row_tile, column_tile = first + within % height, within // height
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    return row_tile, column_tile, row, column


@_jit
def _dot(
    rows: "V", columns: "V", row: "V", column: "V", num_rows: "V", num_columns: "V", depth: "V",
    ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr, EVEN: constexpr,
) -> Any:  # fmt: skip
    """[ROWS, COLUMNS] inner products in float32; past the ends those of some valid row, which needs no mask here."""
    inner = tl.arange(0, DEPTH)
    left = rows + (row % num_rows).to(tl.int64)[:, None] * depth + inner[None, :]
    right = columns + (column % num_columns).to(tl.int64)[None, :] * depth + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = inner < depth - start
            a = tl.load(left, mask=inside[None, :], other=0.0)
            b = tl.load(right, mask=inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
        left += DEPTH
        right += DEPTH
    return total


@_jit
def _logits(
    rows: "V", columns: "V", edge: "V", row: "V", column: "V", num_rows: "V", num_columns: "V", depth: "V", scale: "V",
    ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr, EVEN: constexpr,
) -> Any:  # fmt: skip
    """The tile's logits in base 2, -inf past the ends (`edge`: the tile has any such)."""
    z = _dot(rows, columns, row, column, num_rows, num_columns, depth, ROWS, COLUMNS, DEPTH, EVEN) * tl.load(scale)
    if edge:
        z = tl.where((row < num_rows)[:, None] & (column < num_columns)[None, :], z, float("-inf"))
    return z


@_jit
def softmax_statistics_kernel(
    rows: "V", columns: "V", num_rows: "V", num_columns: "V", depth: "V",
    scale: "V", row_sums: "V", column_sums: "V", peaks: "V", smallest: "V",
    ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr, GROUP: constexpr, EVEN: constexpr,
) -> None:  # fmt: skip
    """row_sums [column tiles, num_rows], column_sums [row tiles, num_columns] of 2^(z - peaks[row tile, column tile]).

    Where one peak does not serve a tile, it is NaN and the sums are log2-sums of 2^z.
    """
    row_tile, column_tile, row, column = _place(num_rows, num_columns, ROWS, COLUMNS, GROUP)
    edge = ((row_tile + 1) * ROWS > num_rows) | ((column_tile + 1) * COLUMNS > num_columns)
    z = _logits(rows, columns, edge, row, column, num_rows, num_columns, depth, scale, ROWS, COLUMNS, DEPTH, EVEN)
    peak = tl.max(tl.max(z, 1), 0)
    power = tl.exp2(z - peak)
    row_sum = tl.sum(power, 1)
    column_sum = tl.sum(power, 0)
    least_row = tl.min(tl.where(row < num_rows, row_sum, 1.0), 0)
    least_column = tl.min(tl.where(column < num_columns, column_sum, 1.0), 0)
    if tl.minimum(least_row, least_column) < smallest:
        # Multiplied again: keeping z beside its power would take the registers of a second program.
        z = _logits(rows, columns, edge, row, column, num_rows, num_columns, depth, scale, ROWS, COLUMNS, DEPTH, EVEN)
        row_peak = tl.max(z, 1)
        column_peak = tl.max(z, 0)
        # A line of -inf alone (an input was infinite) becomes NaN here, as it should.
        row_sum = row_peak + tl.log2(tl.sum(tl.exp2(z - row_peak[:, None]), 1))
        column_sum = column_peak + tl.log2(tl.sum(tl.exp2(z - column_peak[None, :]), 0))
        peak = peak * float("nan")
    tl.store(row_sums + column_tile * num_rows + row, row_sum, mask=row < num_rows)
    tl.store(column_sums + row_tile * num_columns + column, column_sum, mask=column < num_columns)
    tl.store(peaks + row_tile * tl.cdiv(num_columns, COLUMNS) + column_tile, peak)


@_jit
def fold_kernel(
    running: "V", sums: "V", peaks: "V", count: "V", length: "V",
    by_sum: "V", by_tile: "V", TILE: constexpr, COUNT: constexpr, WIDTH: constexpr,
) -> None:  # fmt: skip
    """running[i] <- log2(2^running[i] + sum_t 2^peaks[t, i // TILE] sums[t, i]); peaks' strides are by_sum, by_tile."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < length
    total = tl.load(running + at, mask=inside, other=0.0)
    for start in range(0, count, COUNT):
        which = start + tl.arange(0, COUNT)
        mask = (which < count)[:, None] & inside[None, :]
        part = tl.load(sums + which[:, None] * length + at[None, :], mask=mask, other=0.0)
        peak = tl.load(peaks + which[:, None] * by_sum + (at // TILE)[None, :] * by_tile, mask=mask, other=0.0)
        # Here and not beside the sums, where each thread holds a quarter of them and would repeat its neighbours' work.
        part = tl.where(peak == peak, peak + tl.log2(part), part)
        highest = tl.maximum(total, tl.max(part, 0))
        total = highest + tl.log2(tl.exp2(total - highest) + tl.sum(tl.exp2(part - highest[None, :]), 0))
    tl.store(running + at, total, mask=inside)


@_jit
def put_kernel(
    pairs: "V", pitch: "V", num_rows: "V", num_columns: "V",
    partner: "V", value: "V", first: "V", WIDTH: constexpr,
) -> None:  # fmt: skip
    """pairs[i, partner_i - first] <- value_i, where that is in the chunk."""
    row = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    column = tl.load(partner + row, mask=row < num_rows, other=-1) - first
    inside = (column >= 0) & (column < num_columns)
    tl.store(pairs + row * pitch + column, tl.load(value + row, mask=inside).to(pairs.dtype.element_ty), mask=inside)


@_jit
def _store(pairs: "V", pitch: "V", pair: "V", row: "V", column: "V", num_rows: "V") -> None:
    """Up to `pitch`, a multiple of 64, and not to the end: that mask is whole for 16 bytes, and so is the store."""
    at = pairs + row[:, None] * pitch + column[None, :]
    tl.store(at, pair.to(pairs.dtype.element_ty), mask=(row < num_rows)[:, None] & (column < pitch)[None, :])


@_jit
def softmax_pairs_kernel(
    rows: "V", columns: "V", num_rows: "V", num_columns: "V", depth: "V",
    scale: "V", row_lse: "V", row_grad: "V", row_weight: "V", row_top: "V",
    column_lse: "V", column_grad: "V", column_weight: "V", column_top: "V",
    pairs: "V", pitch: "V",
    ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr, GROUP: constexpr, EVEN: constexpr,
) -> None:  # fmt: skip
    """pairs [num_rows, num_columns], rows `pitch` apart: P of the chunk."""
    row_tile, column_tile, row, column = _place(num_rows, num_columns, ROWS, COLUMNS, GROUP)
    z = _dot(rows, columns, row, column, num_rows, num_columns, depth, ROWS, COLUMNS, DEPTH, EVEN) * tl.load(scale)
    row_at, column_at = row % num_rows, column % num_columns
    row_shift, column_shift = tl.load(row_top + row_tile), tl.load(column_top + column_tile)
    shift = tl.minimum(row_shift, column_shift)
    if row_shift + column_shift == row_shift + column_shift:
        a = tl.load(row_weight + row_at) * tl.exp2(shift - row_shift)
        b = tl.load(column_weight + column_at) * tl.exp2(shift - column_shift)
        pair = tl.exp2(z - shift) * (a[:, None] + b[None, :])
    else:
        a, b = tl.load(row_grad + row_at), tl.load(column_grad + column_at)
        u, v = tl.load(row_lse + row_at), tl.load(column_lse + column_at)
        pair = a[:, None] * tl.exp2(z - u[:, None]) + b[None, :] * tl.exp2(z - v[None, :])
    _store(pairs, pitch, pair, row, column, num_rows)


@_jit
def sigmoid_statistics_kernel(
    rows: "V", columns: "V", num_rows: "V", num_columns: "V", depth: "V",
    scale: "V", bias: "V", sums: "V",
    ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr, GROUP: constexpr, EVEN: constexpr,
) -> None:  # fmt: skip
    """sums [column tiles, num_rows] of log2(1 + 2^t)."""
    _, column_tile, row, column = _place(num_rows, num_columns, ROWS, COLUMNS, GROUP)
    z = _dot(rows, columns, row, column, num_rows, num_columns, depth, ROWS, COLUMNS, DEPTH, EVEN)
    t = z * tl.load(scale) + tl.load(bias)
    # log(1 + e) = 2 artanh(e / (2 + e)) keeps an e that 1 + e would round away; with SigLIP's bias of -10 that is most.
    # The argument is at most 1/3, so what the series leaves out is 3^-12 / 13, float32's resolution.
    e = tl.exp2(-tl.abs(t))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11)))))
    softplus = tl.maximum(t, 0.0) + 2.8853900817779268 * s * series  # 2 log2 e
    if (column_tile + 1) * COLUMNS > num_columns:
        softplus = tl.where((column < num_columns)[None, :], softplus, 0.0)
    tl.store(sums + column_tile * num_rows + row, tl.sum(softplus, 1), mask=row < num_rows)


@_jit
def sigmoid_pairs_kernel(
    rows: "V", columns: "V", num_rows: "V", num_columns: "V", depth: "V",
    scale: "V", bias: "V", row_grad: "V", pairs: "V", pitch: "V", totals: "V",
    ROWS: constexpr, COLUMNS: constexpr, DEPTH: constexpr, GROUP: constexpr, EVEN: constexpr,
) -> None:  # fmt: skip
    """pairs as in the softmax; totals [programs] gains the sum of each program's tile, for d_bias."""
    _, _, row, column = _place(num_rows, num_columns, ROWS, COLUMNS, GROUP)
    z = _dot(rows, columns, row, column, num_rows, num_columns, depth, ROWS, COLUMNS, DEPTH, EVEN)
    t = z * tl.load(scale) + tl.load(bias)
    pair = tl.load(row_grad + row % num_rows)[:, None] / (1.0 + tl.exp2(-t))
    _store(pairs, pitch, pair, row, column, num_rows)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    # The slot is this program's alone, chunk after chunk: no atomics, and the same sum every time.
    slot = totals + tl.program_id(0)
    tl.store(slot, tl.load(slot) + tl.sum(tl.sum(tl.where(inside, pair, 0.0), 1), 0))
