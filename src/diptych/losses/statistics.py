"""Statistics of all pairs as differentiable functions of both sides: `tiles.py`, or `kernel.py` on CUDA.

Memory is O((B + G)·D): neither pass stores a matrix of pairs. Double backward is not supported.

The logits of partners are part of both functions, and not a product beside them: once a pair is learned, the gradients
of its logit from numerator and denominator nearly cancel, and would lose what is left if each were rounded for itself.
"""

from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from diptych.losses import kernel, tiles


def logsumexp_of_pairs(
    rows: Float[Tensor, "B D"], columns: Float[Tensor, "G D"], scale: Float[Tensor, ""], partner: Int[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " G"], Float[Tensor, " B"]]:
    """log Σ_j exp(z_ij) of each row, log Σ_i exp(z_ij) of each column, and each row's z with its partner.

    z = scale · rows @ columnsᵀ, in float32 (float64 for float64). Each pair is multiplied once; once more in backward,
    and twice for the gradients.

    Args:
        partner: place of each row's partner among the columns; negative: it has none, and 0 for a logit.
    """
    return _LogSumExp.apply(rows, columns, scale, partner)


def softplus_of_pairs(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "G D"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    partner: Int[Tensor, " B"],
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Σ_j softplus(z_ij + bias) of each row, and each row's z + bias with its partner."""
    return _Softplus.apply(rows, columns, scale, bias, partner)


def backend(features: Tensor) -> ModuleType:
    """The module whose four functions suit where the features lie and what they are."""
    return kernel if features.dtype != torch.float64 and kernel.is_available(features.device) else tiles


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, partner: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            row_lse, column_lse = backend(rows).softmax_statistics(rows, columns, scale)
            own = _partner_logits(rows, columns, scale, partner)
        ctx.save_for_backward(rows, columns, scale, partner, row_lse, column_lse)
        return row_lse, column_lse, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, columns, scale, partner, row_lse, column_lse = ctx.saved_tensors
        row_grad, column_grad, own_grad = gradients
        with torch.autocast(rows.device.type, enabled=False):
            d_rows, d_columns = backend(rows).softmax_gradients(
                rows, columns, scale, row_lse, column_lse, row_grad, column_grad, partner=(partner, -own_grad)
            )
        return d_rows.to(rows.dtype), d_columns.to(columns.dtype), _scale_gradient(rows, d_rows, scale), None


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, partner: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, columns, scale, bias, partner)
        with torch.autocast(rows.device.type, enabled=False):
            sums = backend(rows).sigmoid_statistics(rows, columns, scale, bias)
            own = _partner_logits(rows, columns, scale, partner)
        return sums, torch.where(partner < 0, 0.0, own + bias.to(own.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rows, columns, scale, bias, partner = ctx.saved_tensors
        row_grad, own_grad = gradients
        with torch.autocast(rows.device.type, enabled=False):
            d_rows, d_columns, d_bias = backend(rows).sigmoid_gradients(
                rows, columns, scale, bias, row_grad, partner=(partner, -own_grad)
            )
        d_scale = _scale_gradient(rows, d_rows, scale)
        return d_rows.to(rows.dtype), d_columns.to(columns.dtype), d_scale, d_bias.to(bias.dtype), None


def _partner_logits(rows: Tensor, columns: Tensor, scale: Tensor, partner: Tensor) -> Tensor:
    """z of each row with its partner, 0 where it has none."""
    dots = tiles.partner_dots(rows, columns, partner)
    return torch.where(partner < 0, 0.0, dots * scale.to(dots.dtype))


def _scale_gradient(rows: Tensor, d_rows: Tensor, scale: Tensor) -> Tensor:
    """Σ_ij P_ij x_ij without another pass over the pairs: Σ_i ⟨row_i, d_row_i⟩ = scale · Σ_ij P_ij x_ij."""
    dots = [torch.linalg.vecdot(rows[at].to(d_rows.dtype), d_rows[at]) for at in tiles.row_spans(rows)]
    return (torch.cat(dots).sum() / scale.to(d_rows.dtype)).to(scale.dtype)
