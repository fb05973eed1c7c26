"""The Triton kernels under Triton's interpreter, against autograd on the dense formulas in float64.

The interpreter is chosen when a kernel is defined, so one other process runs all checks (this file as a program) and
reports each. The kernels are also compiled for Hopper, which needs no GPU: the interpreter takes more of Python.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.losses import kernel, kernel_programs
from diptych.losses.kernel import Tiling

MISSING = importlib.util.find_spec("triton") is None
CHECKS: dict[str, Callable[[], None]] = {}

# Two sizes of tile and of chunk that no shape below is a multiple of; several chunks each way.
TINY = Tiling(rows=16, columns=32, depth=16, group=2, statistics_chunk=64, gradients_chunk=32)
# The error of one rounding, as a share. (The interpreter cuts bfloat16 off where the hardware rounds: twice 2^-8.)
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def features(count: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype)


def grads(count: int, seed: int) -> Tensor:
    """Both signs, some zeros."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(seed)) / count
    return torch.where(torch.arange(count) % 5 == 3, 0.0, drawn)


def near(found: Tensor, right: Tensor, bound: Tensor | float) -> None:
    """Within the bound, or not finite; where the oracle is not finite, neither are we."""
    assert found.dtype == torch.float32
    assert found.shape == right.shape
    found = found.double()
    assert not (found.isfinite() & ~right.isfinite()).any(), "a finite number where there is none"
    excess = ((found - right).abs() - bound)[found.isfinite()]
    assert excess.numel() == 0 or excess.max() <= 0, f"{excess.max().item():.3g} beyond the bound"


def logit_error(scale: float) -> float:
    """Float32 in logits of size `scale` and their statistics: products, sums and base 2 round some 4 times."""
    return (2 + scale) * 2.0**-22


def products(
    pair: Tensor, terms: Tensor, rows: Tensor, columns: Tensor, scale: float, largest: Tensor | float = 0.0
) -> list[tuple[Tensor, Tensor]]:
    """The gradients for a dense float64 P, each with the error to expect.

    P is off by its rounding to the inputs' type, by the error of its exponents (a share of its absolute `terms`), and
    in float16 by 2^-25 where the largest gradient is 2^14.
    """
    floor = largest * 2.0**-38 if rows.dtype == torch.float16 else 0.0
    error = pair.abs() * ROUNDING[rows.dtype] + 2 * logit_error(scale) * terms + floor
    left, right = rows.double(), columns.double()
    return [
        (scale * pair @ right, scale * error @ right.abs() + 1e-30),
        (scale * pair.T @ left, scale * error.T @ left.abs() + 1e-30),
    ]


def softmax_agrees(rows: Tensor, columns: Tensor, scale: float, tiling: Tiling = TINY) -> None:
    """Statistics and gradients of one case, by autograd through the dense matrix."""
    row_grad, col_grad = grads(len(rows), 2), grads(len(columns), 3)
    left, right = rows.double().requires_grad_(), columns.double().requires_grad_()
    z = scale * left @ right.T
    z.retain_grad()
    row_lse, col_lse = z.logsumexp(1), z.logsumexp(0)
    ((row_lse * row_grad).sum() + (col_lse * col_grad).sum()).backward()
    assert z.grad is not None
    s = torch.tensor(scale)
    found = kernel.softmax_statistics(rows, columns, s, tiling=tiling)
    near(found[0], row_lse.detach(), logit_error(scale))
    near(found[1], col_lse.detach(), logit_error(scale))
    terms = (row_grad[:, None].abs() * (z - row_lse[:, None]).exp() + col_grad.abs() * (z - col_lse).exp()).detach()
    slack = products(terms, terms, rows, columns, scale, max(row_grad.abs().max(), col_grad.abs().max()))
    gradients = kernel.softmax_gradients(rows, columns, s, *found, row_grad, col_grad, tiling=tiling)
    for ours, theirs, (_, bound) in zip(gradients, (left.grad, right.grad), slack, strict=True):
        assert theirs is not None
        near(ours, theirs, bound)


def sigmoid_agrees(rows: Tensor, columns: Tensor, scale: float, bias: float) -> None:
    row_grad = grads(len(rows), 2)
    left, right = rows.double().requires_grad_(), columns.double().requires_grad_()
    shift = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    z = scale * left @ right.T + shift
    total = F.softplus(z, threshold=700).sum(1)
    (total * row_grad).sum().backward()
    s, b = torch.tensor(scale), torch.tensor(bias)
    error = logit_error(scale + abs(bias))
    near(kernel.sigmoid_statistics(rows, columns, s, b, tiling=TINY), total.detach(), 2 * error * total.detach())
    found = kernel.sigmoid_gradients(rows, columns, s, b, row_grad, tiling=TINY)
    terms = (row_grad.abs()[:, None] * z.sigmoid()).detach()
    slack = products(terms, terms, rows, columns, scale + abs(bias), row_grad.abs().max())
    assert left.grad is not None
    assert right.grad is not None
    assert shift.grad is not None
    near(found[0], left.grad, slack[0][1])
    near(found[1], right.grad, slack[1][1])
    near(found[2], shift.grad, 2 * error * terms.sum())


SHAPES = [(1, 1, 1), (1, 40, 7), (33, 1, 100), (50, 83, 64), (70, 35, 100), (16, 32, 16)]


@check
def softmax_of_all_shapes_and_types() -> None:
    for (height, width, depth), dtype in product(SHAPES, ROUNDING):
        for scale in (1.0, 14.0, 100.0) if depth == 64 else (14.0,):
            softmax_agrees(features(height, depth, 0, dtype), features(width, depth, 1, dtype), scale)


@check
def sigmoid_of_all_shapes_and_types() -> None:
    for (height, width, depth), dtype in product(SHAPES, ROUNDING):
        # The bias alone decides where float32's 1 + e would lose e.
        for scale, bias in ((10.0, -10.0), (1.0, -20.0), (100.0, 3.0)) if depth == 64 else ((10.0, -10.0),):
            sigmoid_agrees(features(height, depth, 0, dtype), features(width, depth, 1, dtype), scale, bias)


@check
def one_chunk_or_many() -> None:
    rows, columns = features(40, 8, 0), features(75, 8, 1)
    softmax_agrees(rows, columns, 20.0, Tiling(rows=16, columns=16, depth=16))
    softmax_agrees(rows, columns, 20.0, Tiling(rows=16, columns=16, depth=16, statistics_chunk=16, gradients_chunk=16))


def forced(bits: float) -> Tiling:
    return Tiling(rows=16, columns=32, depth=16, statistics_chunk=64, gradients_chunk=64, shared_bits=bits)


def statistics_and_gradients(rows: Tensor, columns: Tensor, scale: float, bits: float) -> list[Tensor]:
    s, row_grad, col_grad = torch.tensor(scale), grads(len(rows), 2), grads(len(columns), 3)
    lse = kernel.softmax_statistics(rows, columns, s, tiling=forced(86.0))
    tried = kernel.softmax_statistics(rows, columns, s, tiling=forced(bits))
    return [*tried, *kernel.softmax_gradients(rows, columns, s, *lse, row_grad, col_grad, tiling=forced(bits))]


@check
def one_exponential_serves_ordinary_tiles() -> None:
    """Bit-equal to the forced branch: it was taken; the other agrees all the same."""
    rows, columns = features(50, 24, 0), features(70, 24, 1)
    taken, shared, separate = (
        statistics_and_gradients(rows, columns, 14.0, bits) for bits in (86, torch.inf, -torch.inf)
    )
    assert all(map(torch.equal, taken, shared))
    assert not all(map(torch.equal, taken, separate))
    softmax_agrees(rows, columns, 14.0, forced(-torch.inf))


def far_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every third row points away: its logits lie 2 scales below its tile's peak. Columns are of two lengths."""
    axis = F.one_hot(torch.tensor(0), 24).double()
    rows = F.normalize(axis + 0.1 * features(50, 24, 0, torch.float64), dim=-1)
    columns = F.normalize(axis + 0.1 * features(70, 24, 1, torch.float64), dim=-1)
    rows[::3] *= -1
    columns[::4] *= torch.tensor(0.3)
    return rows.to(dtype), columns.to(dtype)


@check
def rows_far_below_the_peak_get_their_own_shift() -> None:
    for dtype, scale in product(ROUNDING, (100.0, 300.0)):
        softmax_agrees(*far_rows(dtype), scale)
    right, shared = (statistics_and_gradients(*far_rows(torch.float32), 300.0, bits) for bits in (86, torch.inf))
    # One exponential would have failed here, for each of the four results or at least for the first of each kind.
    assert not torch.allclose(shared[0], right[0])
    assert not torch.allclose(shared[2], right[2])
    softmax_agrees(features(50, 24, 0), features(70, 24, 1), 300.0)


@check
def zero_vectors() -> None:
    rows, columns = features(20, 8, 0), features(40, 8, 1)
    rows[::2] = 0
    columns[5:30] = 0
    softmax_agrees(rows, columns, 50.0)
    sigmoid_agrees(rows, columns, 10.0, -10.0)
    nothing = kernel.softmax_statistics(torch.zeros(5, 3), torch.zeros(70, 3), torch.tensor(100.0), tiling=TINY)
    near(nothing[0], torch.full((5,), 70.0).double().log(), logit_error(1))


@check
def statistics_of_a_larger_matrix() -> None:
    """One part of the columns and of the rows at a time, as ranks do it; the parts' gradients add up."""
    rows, columns, scale = features(45, 12, 0), features(90, 12, 1), torch.tensor(30.0)
    row_grad, col_grad = grads(45, 2), grads(90, 3)
    lse = kernel.softmax_statistics(rows, columns, scale, tiling=TINY)
    whole = kernel.softmax_gradients(rows, columns, scale, *lse, row_grad, col_grad, tiling=TINY)
    d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    for r, c in product((slice(0, 19), slice(19, 45)), (slice(0, 50), slice(50, 90))):
        parts = (rows[r], columns[c], scale, lse[0][r], lse[1][c], row_grad[r], col_grad[c])
        d_row, d_column = kernel.softmax_gradients(*parts, tiling=TINY)
        d_rows[r] += d_row
        d_columns[c] += d_column
    # sums of the same float32 terms in another order
    torch.testing.assert_close(d_rows, whole[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(d_columns, whole[1], atol=1e-6, rtol=1e-5)


@check
def broken_inputs_spread_and_never_vanish() -> None:
    for dtype, bad in product(ROUNDING, (torch.nan, torch.inf, -torch.inf)):
        rows, columns = features(37, 5, 0, dtype), features(45, 5, 1, dtype)
        rows[20, 2] = bad
        softmax_agrees(rows, columns, 10.0)
        sigmoid_agrees(rows, columns, 10.0, -10.0)
        softmax_agrees(columns, rows, 10.0)
        sigmoid_agrees(columns, rows, 10.0, -10.0)
        # The row's one logit is infinite: formula and gradient may have a value, and the row is broken nevertheless.
        lone = (rows, torch.ones_like(columns[:1]), torch.tensor(1.0), torch.tensor(0.0))
        assert kernel.sigmoid_statistics(*lone, tiling=TINY)[20].isnan()
        assert kernel.sigmoid_gradients(*lone, torch.ones(37), tiling=TINY)[0][20].isnan().all()
        row_lse, _ = kernel.softmax_statistics(rows, columns, torch.tensor(10.0), tiling=TINY)
        assert row_lse.isnan().sum() == 1
        assert row_lse[20].isnan()


@check
def partners_are_taken_before_rounding() -> None:
    """Learnt pairs: P - w is right to bfloat16's share of itself, where P alone would be off by a share of P."""
    columns = features(90, 64, 1, torch.bfloat16)
    partner = torch.arange(45) * 2
    partner[7] = -1
    real, rows, scale = partner >= 0, columns[partner].clone(), torch.tensor(12.0)
    row_grad, col_grad, taken = torch.full((45,), 0.5 / 45), torch.full((90,), 0.5 / 90), torch.full((45,), 0.75 / 45)
    hit = torch.zeros(45, 90, dtype=torch.float64)
    hit[real, partner[real]] = 1
    z = 12.0 * rows.double() @ columns.double().T
    u, v = z.logsumexp(1), z.logsumexp(0)

    terms = row_grad[:, None] * (z - u[:, None]).exp() + col_grad * (z - v).exp()
    pair = terms - hit * taken[:, None]
    arguments = (rows, columns, scale, u.float(), v.float(), row_grad, col_grad)
    found = kernel.softmax_gradients(*arguments, partner=(partner, taken), tiling=TINY)
    expected = products(pair, terms, rows, columns, 12.0)
    for ours, (theirs, bound) in zip(found, expected, strict=True):
        near(ours, theirs, bound)
    late = kernel.softmax_gradients(*arguments, tiling=TINY)[0] - 12.0 * (hit * taken[:, None]) @ columns.double()
    assert ((late - expected[0][0]).abs() > 5 * expected[0][1]).any(), "the pairs were meant to be learnt"

    bias = torch.tensor(-2.0)
    terms = row_grad[:, None] * (z - 2.0).sigmoid()
    pair = terms - hit * row_grad[:, None]
    *pulled, d_bias = kernel.sigmoid_gradients(
        rows, columns, scale, bias, row_grad, partner=(partner, row_grad), tiling=TINY
    )
    for ours, (theirs, bound) in zip(pulled, products(pair, terms, rows, columns, 12.0), strict=True):
        near(ours, theirs, bound)
    near(d_bias, pair.sum(), 2 * logit_error(14) * terms.sum())


@check
def float16_keeps_the_gradients_of_a_mean_over_millions() -> None:
    rows, columns, scale = features(30, 16, 0, torch.float16), features(40, 16, 1, torch.float16), torch.tensor(5.0)
    lse = kernel.softmax_statistics(rows, columns, scale, tiling=TINY)
    large, small = (
        kernel.softmax_gradients(rows, columns, scale, *lse, grads(30, 2) * s, grads(40, 3) * s, tiling=TINY)
        for s in (1.0, 2.0**-20)
    )
    assert torch.equal(large[0] * 2.0**-20, small[0])
    assert torch.equal(large[1] * 2.0**-20, small[1])
    nothing = kernel.softmax_gradients(rows, columns, scale, *lse, torch.zeros(30), torch.zeros(40), tiling=TINY)
    assert not nothing[0].any()


@check
def strides_do_not_matter() -> None:
    rows, columns = features(20, 9, 0), features(33, 9, 1)
    apart = torch.stack([columns, columns], 2)[:, :, 0]
    softmax_agrees(rows.T.contiguous().T, apart, 10.0)
    sigmoid_agrees(rows.T.contiguous().T, apart, 10.0, -2.0)


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")
        assert not any(name in str(func) for name in waits), str(func)
        return func(*args, **(kwargs or {}))


@check
def nothing_waits_for_the_device() -> None:
    for dtype in ROUNDING:
        rows, columns = features(20, 9, 0, dtype), features(33, 9, 1, dtype)
        scale, bias, partner = torch.tensor(10.0), torch.tensor(-3.0), (torch.arange(20), grads(20, 2))
        with NoWaiting():
            lse = kernel.softmax_statistics(rows, columns, scale, tiling=TINY)
            row_grad, col_grad = torch.ones(20), torch.ones(33)
            kernel.softmax_gradients(rows, columns, scale, *lse, row_grad, col_grad, partner=partner, tiling=TINY)
            kernel.sigmoid_statistics(rows, columns, scale, bias, tiling=TINY)
            kernel.sigmoid_gradients(rows, columns, scale, bias, row_grad, partner=partner, tiling=TINY)


@check
def the_loss_runs_on_it() -> None:
    from diptych.losses.contrastive import contrastive_loss

    kept = kernel.is_available, kernel.SINGLE
    found = []
    try:
        for on_kernel in (True, False):
            kernel.is_available = lambda device, answer=on_kernel: answer
            kernel.SINGLE = TINY
            for options in ({}, {"normaliser": "sigmoid", "logit_bias": -5.0}):
                image, text = (features(50, 24, seed).requires_grad_() for seed in (0, 1))
                scale = torch.tensor(14.0, requires_grad=True)
                loss = contrastive_loss(image, text, scale, **options)
                found.append([loss.detach(), *torch.autograd.grad(loss, [image, text, scale])])
    finally:
        kernel.is_available, kernel.SINGLE = kept
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def load_without_triton() -> Any:
    spec = importlib.util.spec_from_file_location("kernel_without_triton", kernel_programs.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Runs the checks and reports what each found: nothing, or a traceback."""
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # The interpreter (3.7) would multiply bfloat16's bit patterns.
        if a.dtype == interpreter.tl.bfloat16:
            a, b = (
                interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), interpreter.tl.float32)
                for x in (a, b)
            )
        return multiply(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = widened
    torch.set_num_threads(1)
    report = {}
    for name, function in CHECKS.items():
        try:
            function()
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(report))


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    if MISSING:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    # Overflows and NaN are what some checks are about; numpy, which the interpreter computes with, warns of them.
    command = [sys.executable, "-W", "ignore", str(Path(__file__))]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout))


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(report: dict[str, str], name: str) -> None:
    assert not report[name], report[name]


KERNELS = [
    "softmax_statistics_kernel",
    "fold_kernel",
    "softmax_pairs_kernel",
    "put_kernel",
    "sigmoid_statistics_kernel",
    "sigmoid_pairs_kernel",
]


@pytest.mark.skipif(MISSING, reason="triton is not installed")
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_hopper(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler takes less of Python than the interpreter does; it needs no GPU, and brings ptxas along."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, tiling = getattr(kernel_programs, name), kernel.HALF
    constants = {"ROWS": tiling.rows, "COLUMNS": tiling.columns, "DEPTH": tiling.depth, "GROUP": 8, "EVEN": False}
    constants |= {"TILE": tiling.rows, "COUNT": 32, "WIDTH": 64}
    kinds = dict.fromkeys(("rows", "columns", "pairs"), "*bf16") | {"smallest": "fp32", "partner": "*i64"}
    kinds |= dict.fromkeys(
        ("num_rows", "num_columns", "depth", "pitch", "count", "length", "by_sum", "by_tile", "first"), "i32"
    )
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "*fp32") for argument in function.arg_names}
    source = ASTSource(function, signature, {name: value for name, value in constants.items() if name in signature})
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "maxnreg": tiling.registers}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert built.asm["cubin"]
    if "DEPTH" in signature:
        assert "wgmma" in built.asm["ptx"], "not on Hopper's tensor cores"


def test_without_triton_the_module_still_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernel_without_triton", raising=False)
    module = load_without_triton()
    assert not module.INSTALLED
    monkeypatch.setattr(kernel, "INSTALLED", False)
    assert not kernel.is_available(torch.device("cuda"))
    del sys.modules["kernel_without_triton"]


def test_only_cuda_will_do() -> None:
    assert not kernel.is_available(torch.device("cpu"))
    assert kernel.is_available(torch.device("cuda")) <= torch.cuda.is_available()


def test_mixed_types_are_refused() -> None:
    with pytest.raises(ValueError, match="must share"):
        kernel.softmax_statistics(features(2, 3, 0), features(2, 3, 1, torch.float16), torch.tensor(1.0))


if __name__ == "__main__":
    main()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_on_a_gpu_it_is_the_processors(dtype: torch.dtype, sigmoid: bool) -> None:
    from diptych.losses.contrastive import contrastive_loss

    found = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        image, text = (features(1500, 320, seed, dtype).to(device, kind).requires_grad_() for seed in (0, 1))
        options = {"normaliser": "sigmoid", "logit_bias": -5.0} if sigmoid else {}
        loss = contrastive_loss(image, text, 20.0, **options)
        found.append([loss.detach(), *torch.autograd.grad(loss, [image, text])])
    for ours, right in zip(*found, strict=True):
        error = (ours.double().cpu() - right).norm() / right.norm()
        assert error < 4 * ROUNDING[dtype] + 2**-18
