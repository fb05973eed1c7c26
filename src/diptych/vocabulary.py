"""The loss of tokens over a vocabulary, whose logits never stand in memory together.

    z_t = h_t · M                                                   [V], for a tile of tokens at a time
    loss_t = (1 − ε)·(lse_t − z_ty) + ε·(lse_t − mean_v z_tv) + ζ·lse_t²,      lse_t = log Σ_v exp z_tv

    T tokens, W numbers each, V words          forward    a tile of z is made, folded into lse, and dropped
    y: the right word                          backward   it is made again, and turned into the gradients of h and M
    ε: label smoothing, ζ: z-loss                         dz_tv = p_tv·(1 + 2ζ·lse_t) − (1 − ε)·[v = y] − ε / V

Memory is a tile's and the gradients' own instead of T·V several times over; the price is one product more in backward.
Products and sums are float32, float64 for float64; under autocast on CUDA the factors of products are rounded to
autocast's dtype, as everywhere else there, and added up in float32.

Source of the z-loss: arXiv:2204.02311, section 5 (there ζ = 1e-4).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -1
"""In place of the right word: a token that has none, such as padding."""
_TILE_BYTES, _TILE_BYTES_ON_ACCELERATORS = 32 << 20, 128 << 20


@dataclass(frozen=True)
class TokenLoss:
    """How the loss of a token is made."""

    label_smoothing: float = 0.0
    """ε: the share of the target that goes to all words alike."""
    z_loss: float = 0.0
    """ζ: keeps log Σ exp z near 0."""


def token_losses(
    hidden: Float[Tensor, "T W"], vocabulary: Float[Tensor, "W V"], targets: Int[Tensor, " T"], form: TokenLoss
) -> Float[Tensor, " T"]:
    """The loss of each token, 0 where its target is `IGNORED`."""
    if hidden.is_cuda:  # to count the ignored would be a synchronisation
        counted = targets != IGNORED
        losses: Tensor = _TokenLosses.apply(hidden, vocabulary, targets.clamp(min=0), form)
        return torch.where(counted, losses, 0)
    places = (targets != IGNORED).nonzero().squeeze(1)
    losses = _TokenLosses.apply(hidden[places], vocabulary, targets[places], form)
    return losses.new_zeros(len(targets)).index_copy(0, places, losses)


class _TokenLosses(torch.autograd.Function):
    """Tile by tile, both ways."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, vocabulary: Tensor, targets: Tensor, form: TokenLoss) -> Tensor:
        dtype = _dtype_of_factors(hidden, vocabulary)
        losses, lse = [torch.empty(len(hidden), dtype=_sums(dtype), device=hidden.device) for _ in range(2)]
        with _no_autocast(hidden):
            matrix = vocabulary.to(dtype)
            for at in _tiles(hidden, vocabulary):
                logits = _product(hidden[at].to(dtype), matrix)
                right = logits.gather(1, targets[at, None]).squeeze(1)
                mean = logits.mean(1) if form.label_smoothing else right
                # In place: a second tile beside the first would be half of the memory that there is.
                lse[at] = _logsumexp_(logits)
                losses[at] = lse[at] - torch.lerp(right, mean, form.label_smoothing) + form.z_loss * lse[at] ** 2
        ctx.save_for_backward(hidden, vocabulary, targets, lse)  # the parameter itself: ZeRO takes it away in between
        ctx.form, ctx.dtype = form, dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, vocabulary, targets, lse = ctx.saved_tensors
        of_hidden, of_vocabulary = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if of_hidden else None
        gradient = (
            torch.zeros(vocabulary.shape, dtype=_sums(ctx.dtype), device=hidden.device) if of_vocabulary else None
        )
        with _no_autocast(hidden):
            matrix = vocabulary.to(ctx.dtype)
            for at in _tiles(hidden, vocabulary):
                rows = hidden[at].to(ctx.dtype)
                tile = _product(rows, matrix)
                tile = _gradient_of_logits_(tile, targets[at], lse[at], gradients[0][at], ctx.form).to(ctx.dtype)
                if hidden_gradient is not None:
                    hidden_gradient[at] = _product(tile, matrix.T).to(hidden.dtype)
                if gradient is not None:
                    _add_product(gradient, rows.T, tile)
        return hidden_gradient, gradient.to(vocabulary.dtype) if gradient is not None else None, None, None


def _gradient_of_logits_(tile: Tensor, targets: Tensor, lse: Tensor, gradient: Tensor, form: TokenLoss) -> Tensor:
    """From logits to the gradient with respect to them, in their place."""
    tile.sub_(lse[:, None]).exp_().mul_((gradient * (1 + 2 * form.z_loss * lse))[:, None])
    if form.label_smoothing:
        tile.sub_((gradient * (form.label_smoothing / tile.shape[1]))[:, None])
    return tile.scatter_add_(1, targets[:, None], (gradient * (form.label_smoothing - 1))[:, None])


def _logsumexp_(tile: Tensor) -> Tensor:
    """That of each row; the tile is overwritten."""
    largest = tile.amax(1)
    return tile.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)  # on CUDA alone, see `_dtype_of_factors`
    return left @ right


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(_product(left, right))


def _dtype_of_factors(hidden: Tensor, vocabulary: Tensor) -> torch.dtype:
    widest = torch.promote_types(torch.promote_types(hidden.dtype, vocabulary.dtype), torch.float32)
    if hidden.is_cuda and widest == torch.float32 and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return widest


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    return torch.autocast(tensor.device.type, enabled=False)


def _tiles(hidden: Tensor, vocabulary: Tensor) -> Iterator[slice]:
    """Tokens whose logits make a tile, in order."""
    room = _TILE_BYTES if hidden.device.type == "cpu" else _TILE_BYTES_ON_ACCELERATORS
    rows = max(1, room // (4 * vocabulary.shape[1]))
    return (slice(start, min(start + rows, len(hidden))) for start in range(0, len(hidden), rows))
