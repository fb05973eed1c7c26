"""Attention whose queries, keys and values are layers of their own, and the way back to one packed matrix."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_PARTS = ("q_proj", "k_proj", "v_proj")


class UnpackedAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, from four linear layers, so that an adapter finds each of them.

    With one packed matrix [3W, W], as open_clip has it, no layer is there to be wrapped, and queries, keys and values
    would share a change of rank r. Weights are equal, sums are the same; `packed` gives back what came in.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        width = packed.embed_dim
        biased = packed.in_proj_bias is not None
        self.num_heads = packed.num_heads
        self.head_dim = packed.head_dim
        self.dropout = packed.dropout
        self.batch_first = packed.batch_first
        assert packed.in_proj_weight is not None, "is_packed has seen to it"
        for number, name in enumerate(_PARTS):
            part = nn.Linear(width, width, bias=biased, device=packed.in_proj_weight.device)
            rows = slice(number * width, (number + 1) * width)
            _take(part.weight, packed.in_proj_weight, rows)
            if packed.in_proj_bias is not None:
                _take(part.bias, packed.in_proj_bias, rows)
            setattr(self, name, part)
        # A plain layer: that of `nn.MultiheadAttention` refuses to be quantised, and is no exact nn.Linear.
        self.out_proj = nn.Linear(width, width, bias=packed.out_proj.bias is not None)
        self.out_proj.weight, self.out_proj.bias = packed.out_proj.weight, packed.out_proj.bias

    def forward(
        self,
        query: Float[Tensor, "B Q W"],
        key: Float[Tensor, "B K W"],
        value: Float[Tensor, "B K W"],
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B Q W"], None]:
        """As that of `nn.MultiheadAttention`, without the weights; [Q, B, W] where it is not `batch_first`."""
        if not self.batch_first:
            query, key, value = (side.transpose(0, 1) for side in (query, key, value))
        q, k, v = (
            getattr(self, name)(side).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for name, side in zip(_PARTS, (query, key, value), strict=True)
        )
        if attn_mask is not None:  # True means "not there" to `nn.MultiheadAttention`, and "there" below
            attn_mask = attn_mask.to(q.dtype) if attn_mask.is_floating_point() else ~attn_mask
        dropped = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropped)
        found = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (found if self.batch_first else found.transpose(0, 1)), None

    def packed(self) -> nn.MultiheadAttention:
        """The same as one module of torch; its layers must be plain again."""
        parts: list[Any] = [getattr(self, name) for name in _PARTS]
        biased = parts[0].bias is not None
        whole = nn.MultiheadAttention(
            self.num_heads * self.head_dim, self.num_heads, self.dropout, bias=biased, batch_first=self.batch_first
        )
        with torch.no_grad():
            whole.in_proj_weight = _parameter([part.weight for part in parts])
            if biased:
                whole.in_proj_bias = _parameter([part.bias for part in parts])
        whole.out_proj.weight, whole.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return whole.train(self.training)


def _take(parameter: Tensor, packed: Tensor, rows: slice) -> None:
    with torch.no_grad():
        parameter.copy_(packed[rows])
    parameter.requires_grad = packed.requires_grad


def _parameter(parts: list[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(torch.cat(list(parts)), requires_grad=parts[0].requires_grad)


def is_packed(module: nn.Module) -> bool:
    """Whether it is attention of queries, keys and values of one width in one matrix."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


def unpack(tower: nn.Module) -> int:
    """Unpacks all such attention in place; how many there were."""
    found = [
        (parent, name) for parent in tower.modules() for name, module in parent.named_children() if is_packed(module)
    ]
    for parent, name in found:
        setattr(parent, name, UnpackedAttention(getattr(parent, name)))
    return len(found)


def pack(tower: nn.Module) -> None:
    """The reverse of `unpack`."""
    for parent in list(tower.modules()):
        for name, module in parent.named_children():
            if isinstance(module, UnpackedAttention):
                setattr(parent, name, module.packed())
