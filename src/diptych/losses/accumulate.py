"""A contrastive batch larger than memory: exact gradients from micro-batches.

    1  embed every micro-batch without a graph                    features [B, D]
    2  the loss of the whole batch, and its gradient with respect to the features
    3  embed every micro-batch again, with its graph and the same random numbers; send the cached gradient through

The gradient is that of one forward pass over all micro-batches, dropout included, at the memory of one micro-batch and
the price of a second forward pass. Ranks gather in 2 alone; parameters are synchronised once, by the last micro-batch.

Source: arXiv:2101.06983, and arXiv:2111.10050 for images and texts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MicroBatch = TypeVar("MicroBatch")
Result = TypeVar("Result")
Features = Mapping[str, Tensor | None]
"""Named outputs of a forward pass: [b, …] per row, or a scalar such as logit_scale that all rows share."""


def accumulate(
    embed: Callable[[MicroBatch], Features],
    micro_batches: Sequence[MicroBatch],
    objective: Callable[[Features], tuple[Tensor, Result]],
    *,
    synchronised: Callable[[bool], AbstractContextManager[Any]] = lambda last: nullcontext(),
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> Result:
    """Leaves in every parameter's `.grad` what one pass over all micro-batches would add to it. Every rank must call,
    with the same number of micro-batches.

    Args:
        embed: the forward pass; a function of the micro-batch, the parameters and torch's random state alone.
        micro_batches: this rank's rows, in order.
        objective: the loss of this rank's whole batch, and whatever else the caller wants of it.
        synchronised: told whether a micro-batch is the last, gives the context of its forward and backward pass;
            `gradient_sync(model)` suits DDP, FSDP2 and DeepSpeed.
        backward: how a loss is differentiated (an engine's own, where it has one).

    Returns:
        The second value of `objective`.
    """
    if not micro_batches:
        raise ValueError("no micro-batches · accumulate · give at least one")
    parts: list[Features] = []
    states: list[RandomState] = []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(RandomState())
            parts.append(embed(micro_batch))
    features = {name: _leaf(name, parts) for name in parts[0]}
    total, result = objective(features)
    total.backward()
    for number, (micro_batch, state) in enumerate(zip(micro_batches, states, strict=True)):
        last = number == len(micro_batches) - 1
        with synchronised(last), state.replayed():
            backward(_surrogate(embed(micro_batch), features, parts, number, last=last))
    return result


def _leaf(name: str, parts: Sequence[Features]) -> Tensor | None:
    """All rows of one output, or the scalar that all micro-batches share, as a leaf of the loss's graph."""
    tensors = [part[name] for part in parts]
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    whole = present[0] if _is_shared(name, present[0]) else torch.cat(present)
    return whole.detach().requires_grad_(whole.is_floating_point())


def _is_shared(name: str, output: Tensor) -> bool:
    """Whether all rows share an output; a scale may be a vector of one, which FSDP2 and ZeRO want of parameters."""
    return output.ndim == 0 or name in ("logit_scale", "logit_bias")


def _surrogate(again: Features, features: Features, parts: Sequence[Features], number: int, *, last: bool) -> Tensor:
    """⟨output, cached gradient⟩: its gradient is the loss's. Scalars that all share count once, with the last."""
    terms = []
    for name, output in again.items():
        whole = features[name]
        if output is None or whole is None or whole.grad is None or not output.requires_grad:
            continue
        if _is_shared(name, output):
            terms.append((output * whole.grad if last else output * 0).sum())
            continue
        start = sum(len(_rows(part, name)) for part in parts[:number])
        terms.append((output * whole.grad[start : start + len(output)]).sum())
    if not terms:
        raise ValueError("the loss depends on no output of the forward pass · accumulate · check `embed`")
    return torch.stack([term.float() for term in terms]).sum()


def _rows(part: Features, name: str) -> Tensor:
    rows = part[name]
    assert rows is not None, "an output is there for all micro-batches or for none"
    return rows


class RandomState:
    """Torch's random numbers from here on: the processor's and the current device's."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the same numbers are drawn again; afterwards the sequence goes on where it was."""
        devices = [torch.cuda.current_device()] if self._cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda)
            yield


def gradient_sync(model: nn.Module) -> Callable[[bool], AbstractContextManager[Any]]:
    """For `accumulate`: gradients of a wrapped model are averaged over the ranks with the last micro-batch only.

    DDP's `no_sync`, FSDP2's `set_requires_gradient_sync`, DeepSpeed's accumulation boundary; nothing for plain modules.
    """

    @contextmanager
    def context(last: bool) -> Iterator[None]:
        for name in ("set_gradient_accumulation_boundary", "set_requires_gradient_sync"):
            if hasattr(model, name):
                getattr(model, name)(last)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            yield

    return context
