"""Collectives that gradients flow through. Every rank of the group must call each of them, in the same order.

The sum of the ranks' losses is what is differentiated: with data-parallel averaging of the gradients, their mean. Every
rank of a group brings the same number of rows. In a group of one they are the identity.

Double backward is not supported.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diptych.distributed.groups import Group, world_group
from diptych.errors import DiptychError


class _AllGather(torch.autograd.Function):
    """Concatenation over ranks; backward sums each rank's share of the gradient over all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _concatenated(local, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradients[0], ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """The sum over ranks of each one's own share; backward gives every rank the gradients of all shares."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(whole, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _concatenated(gradients[0], ctx.group), None


class _MergeLogSumExp(torch.autograd.Function):
    """log Σ_ranks exp(partial), of which each rank keeps its own share."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        parts = _exchanged(partial, group)
        merged = torch.logsumexp(parts, 0)
        ctx.group = group
        ctx.save_for_backward(partial, merged)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        partial, merged = ctx.saved_tensors
        merged_all, gradient_all = _concatenated(torch.stack([merged, gradients[0]], 1), ctx.group).unbind(1)
        share = torch.where(partial == -torch.inf, 0.0, (partial - merged_all).exp())
        return share * gradient_all, None


def _concatenated(local: Tensor, group: Group) -> Tensor:
    gathered, work = _start_gather(local, group)
    work.wait()
    return gathered


def _start_gather(local: Tensor, group: Group) -> tuple[Tensor, Any]:
    """Memory for the rows of all ranks, and what to wait for until they are there."""
    gathered = local.new_empty((group.size * local.shape[0], *local.shape[1:]))
    parts = list(gathered.chunk(group.size))
    return gathered, dist.all_gather(parts, local.contiguous(), group=group.handle, async_op=True)


def _reduce_scatter(whole: Tensor, group: Group) -> Tensor:
    share, work = _start_reduce_scatter(whole, group)
    work.wait()
    return share


def _start_reduce_scatter(whole: Tensor, group: Group) -> tuple[Tensor, Any]:
    """Memory for this rank's share of the sum, and what to wait for until it is there."""
    share = whole.new_empty((whole.shape[0] // group.size, *whole.shape[1:]))
    parts = list(whole.contiguous().chunk(group.size))
    return share, dist.reduce_scatter(share, parts, group=group.handle, async_op=True)


def _exchanged(whole: Tensor, group: Group) -> Tensor:
    """Every rank's version of this rank's share: [size, share]."""
    received = torch.empty_like(whole)
    dist.all_to_all_single(received, whole.contiguous(), group=group.handle)
    return received.view(group.size, -1)


def all_gather(local: Float[Tensor, "B ..."], group: Group) -> Float[Tensor, "G ..."]:
    """The rows of all ranks of the group in rank order, with gradients back to the rank that owns each row."""
    return _AllGather.apply(local, group) if group.size > 1 else local


def all_gather_rows(local: Tensor, group: Group) -> Tensor:
    """The same for integers such as ids, and for what no gradient belongs to."""
    return _concatenated(local.detach(), group) if group.size > 1 else local.detach()


class PendingGather:
    """A gather under way: what needs no other rank's rows can be computed before `wait`.

    In backward the sum over ranks is under way likewise while the gradients of that computation are made.
    """

    def __init__(self, local: Float[Tensor, "B D"], group: Group) -> None:
        self._group = group
        self._sent: Tensor | None = _Sent.apply(local, self)
        gathered, self._work = _start_gather(local.detach(), group)
        self._gathered: Tensor | None = gathered

    def wait(self) -> Float[Tensor, "G D"]:
        """The rows of all ranks in rank order; the own ones among them carry no gradient to this rank's `local`."""
        self._work.wait()
        # Both nodes know this object. Were it to know them or their outputs, no collector could ever free the graph.
        sent, self._sent = self._sent, None
        return _Received.apply(sent, self)

    def received(self) -> Tensor:
        """The gathered rows, once."""
        gathered, self._gathered = self._gathered, None
        assert gathered is not None, "a gather is waited for once"
        return gathered

    def start_sum(self, gradient: Tensor) -> Tensor:
        """Begins to add up the ranks' gradients; the result is complete after `finish_sum`."""
        share, self._work = _start_reduce_scatter(gradient, self._group)
        return share

    def finish_sum(self) -> None:
        """Waits for the sum."""
        self._work.wait()


class _Sent(torch.autograd.Function):
    """Made before the computation that overlaps, so that its backward comes after that computation's."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, pending: PendingGather) -> Tensor:
        ctx.pending = pending
        return local.view_as(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.pending.finish_sum()
        return gradients[0], None


class _Received(torch.autograd.Function):
    """Made after the computation that overlaps, so that its backward comes before that computation's."""

    @staticmethod
    def forward(ctx: Any, _sent: Tensor, pending: PendingGather) -> Tensor:
        ctx.pending = pending
        return pending.received()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.pending.start_sum(gradients[0]), None


def merge(partial: Float[Tensor, " G"], kind: Literal["sum", "logsumexp"], group: Group) -> Float[Tensor, " B"]:
    """This rank's share of what every rank of the group knows a part of: the sum, or the log-sum-exp, over ranks."""
    if group.size == 1:
        return partial
    return _ReduceScatter.apply(partial, group) if kind == "sum" else _MergeLogSumExp.apply(partial, group)


def mean_over(value: Float[Tensor, "..."], group: Group) -> Float[Tensor, "..."]:
    """The mean of a value over the ranks, without gradient."""
    if group.size == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total, group=group.handle)
    return total / group.size


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces gradients by their mean over all ranks: for parameters that no data-parallel wrapper looks after."""
    group = world_group()
    for parameter in parameters:
        if group.size > 1 and parameter.requires_grad:
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = mean_over(gradient, group)


def gather_objects(value: Any) -> list[Any]:
    """The plain value (integers, strings, maps of them) of every rank of the world, in rank order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(problem: DiptychError | None) -> None:
    """Raises what any rank brings, on every rank: one that went on alone would wait for the others. Every rank must
    call."""
    for found in gather_objects(problem):
        if found is not None:
            raise found


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
