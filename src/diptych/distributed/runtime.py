"""Where this process stands: device, rank, world, precision. One of the two places that read environment variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and progress."""
        return self.rank == 0


def launched_ranks() -> Ranks:
    """Rank and world size as a launcher (accelerate, torchrun, slurm recipes) announces them; one process otherwise."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks of a launcher, in a group and watched while they are inside; one process where nothing was launched."""
    if launched_ranks().world_size == 1:
        yield launched_ranks()
        return
    from diptych.distributed.wrap import Engine  # imports accelerate, which takes a second

    with Engine("fp32") as engine:
        yield engine.ranks


def ranks_per_node(world_size: int) -> int:
    """Processes on this machine as the launcher announces them; all of them where it says nothing."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))


def main_address() -> str:
    """The first rank's host as the launcher announces it; this machine where it says nothing."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def resolve_precision(precision: Precision) -> Literal["bf16", "fp32"]:
    """`auto` is bf16 where the hardware multiplies it natively (CUDA since Ampere; AVX512-BF16 or AMX), else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
