"""FSDP2: parameters, gradients and optimizer state divided among the ranks, block by block; and whole tensors again.

Each rank keeps a slice of every parameter. A block's parameters are gathered before its forward and backward pass and
dropped behind it; its gradients are averaged and divided. The functions that put together and take apart know ZeRO's
parameters too. On one rank, or where nothing is divided, tensors are whole already and come back as they are.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diptych.distributed import zero


def shard(model: nn.Module, *, device_type: str, world_size: int, low_precision: bool) -> None:
    """Divides a model's parameters among all ranks, in place. Every rank must call, with the same weights.

    Args:
        low_precision: gather parameters as bf16; gradients are reduced, and weights kept, in float32.
    """
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other
    mesh = init_device_mesh(device_type, (world_size,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low_precision else MixedPrecisionPolicy()
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that repeat: members of the lists and sequences of modules of one kind."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            parts = [part for part in module if any(True for _ in part.parameters())]
            if len(parts) > 1 and len({type(part) for part in parts}) == 1 and any(True for _ in parts[0].children()):
                yield from parts


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor put together, on every rank. Every rank must call, for the same tensors in the same order."""
    if zero.is_divided(tensor):
        return zero.whole(tensor)
    if is_compressed(tensor):
        return _decompressed(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_compressed(tensor: object) -> bool:
    """Whether torchao keeps it in fewer bits: int8 or NF4."""
    return hasattr(tensor, "qdata") or hasattr(tensor, "quantized_data")


def _decompressed(tensor: Any) -> Tensor:
    found: Tensor = tensor.get_original_weight() if hasattr(tensor, "quantized_data") else tensor.dequantize()
    return found


def own(tensor: Tensor) -> Tensor:
    """This rank's slice, sharing its memory."""
    if zero.is_divided(tensor):
        return tensor.ds_tensor  # type: ignore[attr-defined]
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> list[Tensor]:
    """All that this rank holds of a tensor, sharing its memory, its slice first: ZeRO keeps some of it twice."""
    return [own(tensor), *(zero.copies(tensor) if zero.has(tensor) else ())]


@torch.no_grad()
def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value in the form of another tensor of its shape: divided as that one is, in that one's memory order."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device, tensor.dtype)
        return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return torch.empty_like(tensor, requires_grad=False).copy_(value)


@torch.no_grad()
def fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Loads whole weights and buffers into a module that may be divided.

    Raises:
        RuntimeError: names or shapes differ.
    """
    state = module.state_dict(keep_vars=True)
    wrong = [name for name in {**state, **values} if name not in state or name not in values]
    wrong += [name for name in state if name not in wrong and zero.shape(state[name]) != values[name].shape]
    if wrong:
        raise RuntimeError(f"names or shapes differ: {', '.join(wrong[:3])}")
    for name, tensor in state.items():
        if zero.has(tensor):
            zero.take(tensor, values[name])
        elif is_compressed(tensor):  # and so frozen: made from the base anew
            if not torch.equal(_decompressed(tensor).cpu(), values[name].to(tensor.dtype)):
                raise RuntimeError(f"{name} is compressed, and its base has changed since")
        else:
            own(tensor).copy_(own(like(values[name], tensor)))


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, whole on every rank. Every rank must call."""
    gradients = list(tensors)
    parts = [[tensor for tensor in gradients if isinstance(tensor, DTensor) is divided] for divided in (True, False)]
    norms = [whole(torch.nn.utils.get_total_norm(part)) for part in parts if part]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)
