"""Which features a rank's rows are compared with: its own, or those of every rank."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.distributed.collectives import all_gather, all_gather_rows


def gather_features(local: Float[Tensor, "B D"]) -> Float[Tensor, "G D"]:
    """The features of all ranks in rank order, with gradients to each rank's own. Every rank must call."""
    return all_gather(local)


def gather_ids(local: Int[Tensor, " B"]) -> Int[Tensor, " G"]:
    """The ids of all ranks in rank order. Every rank must call."""
    return all_gather_rows(local)


def own_rows(local: Float[Tensor, "B D"], *, rank: int) -> Int[Tensor, " B"]:
    """Position of each local row among the gathered ones."""
    return torch.arange(local.shape[0], device=local.device) + rank * local.shape[0]
