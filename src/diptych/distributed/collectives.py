"""Collectives that gradients flow through. Every rank of the group must call each of them, in the same order."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """Concatenation over ranks; backward sums each rank's share of the gradient over all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _concatenated(local, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        world = dist.get_world_size(ctx.group)
        share = gradient.new_empty((gradient.shape[0] // world, *gradient.shape[1:]))
        dist.reduce_scatter(share, list(gradient.contiguous().chunk(world)), group=ctx.group)
        return share, None


def _concatenated(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    world = dist.get_world_size(group)
    gathered = local.new_empty((world * local.shape[0], *local.shape[1:]))
    dist.all_gather(list(gathered.chunk(world)), local.contiguous(), group=group)
    return gathered


def all_gather(local: Float[Tensor, "B ..."], group: dist.ProcessGroup | None = None) -> Float[Tensor, "G ..."]:
    """The rows of all ranks in rank order, with gradients back to the rank that owns each row.

    The sum of the ranks' losses is what is differentiated: with data-parallel averaging of the gradients, the mean.
    Every rank must bring the same number of rows. Outside a process group it is the identity.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return local
    return _AllGather.apply(local, group)


def all_gather_rows(local: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The same for integers such as ids: no gradient."""
    if not (dist.is_available() and dist.is_initialized()):
        return local
    return _concatenated(local, group)


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's plain value (integers, strings, maps of them), in rank order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
