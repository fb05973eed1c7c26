"""Accelerate's door: how a model runs on one or many processes. Nothing else imports accelerate."""

import datetime
import os
from contextlib import AbstractContextManager
from typing import Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diptych.distributed import sharding
from diptych.distributed.runtime import Ranks
from diptych.errors import DistributedError

_TIMEOUT = datetime.timedelta(minutes=10)
Way = Literal["single", "ddp", "fsdp2"]


class Engine:
    """This process of a run: its device, its rank, and how gradients are made and shared."""

    def __init__(self, precision: Literal["bf16", "fp32"]) -> None:
        """Joins the process group that a launcher announced, if one did.

        Raises:
            DistributedError: a launcher announced several ranks and the group has another size.
        """
        on_cpu = not torch.cuda.is_available()
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        # Accelerate keeps the precision of the first run in a process for ever; a second run may want another.
        AcceleratorState._reset_state()
        group = InitProcessGroupKwargs(backend="gloo" if on_cpu else None, timeout=_TIMEOUT)
        self._accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            kwargs_handlers=[group] if announced > 1 else [],
        )
        self.ranks = Ranks(self._accelerator.process_index, self._accelerator.num_processes)
        self._way = _way(self._accelerator.distributed_type, self.ranks.world_size)
        if self.ranks.world_size != announced:
            raise DistributedError(
                f"{announced} processes were launched but the group has {self.ranks.world_size} · rank "
                f"{self.ranks.rank} · check the accelerate configuration"
            )

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._accelerator.device

    @property
    def way(self) -> Way:
        """How a run is divided, as the accelerate configuration asks."""
        return self._way

    def shard(self, *models: nn.Module) -> None:
        """Divides the models' parameters among the ranks where the run is divided by FSDP2; before the optimizer is
        built, for parameters are replaced. Every rank must call."""
        if self._way == "fsdp2":
            for model in models:
                sharding.shard(
                    model,
                    device_type=self.device.type,
                    world_size=self.ranks.world_size,
                    low_precision=self._accelerator.mixed_precision == "bf16",
                )

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the training step calls it: itself, or within what averages its gradients."""
        if self._way != "ddp":
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # The loss sees to it that every parameter takes part; looking for those that do not would cost each step.
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def autocast(self) -> AbstractContextManager[None]:
        """Where the forward pass runs in bf16, if the run does."""
        return self._accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean of the ranks' losses."""
        self._accelerator.backward(loss)

    def close(self) -> None:
        """Leaves the process group."""
        self._accelerator.end_training()


def _way(kind: DistributedType, world_size: int) -> Way:
    """What the accelerate configuration asks for; on CPU accelerate itself would quietly make FSDP plain DDP.

    Raises:
        DistributedError: it asks for something that training does not do.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise DistributedError("FSDP version 1 is not supported · accelerate configuration · set fsdp_version: 2")
        return "fsdp2" if world_size > 1 else "single"
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise DistributedError(
            f"{kind.value} is not supported · accelerate configuration · use one of those in configs/accelerate"
        )
    return "ddp" if world_size > 1 else "single"
