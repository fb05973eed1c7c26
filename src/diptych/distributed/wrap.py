"""Accelerate's door: how a model runs on one or many processes. Nothing else imports accelerate."""

import datetime
import os
from contextlib import AbstractContextManager
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from diptych.distributed.runtime import Ranks
from diptych.errors import DistributedError

_TIMEOUT = datetime.timedelta(minutes=10)
M = TypeVar("M", bound=nn.Module)


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
        if self.ranks.world_size != announced:
            raise DistributedError(
                f"{announced} processes were launched but the group has {self.ranks.world_size} · rank "
                f"{self.ranks.rank} · check the accelerate configuration"
            )

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._accelerator.device

    def prepare(self, model: M, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Moves the model to the device and wraps both as the accelerate configuration asks."""
        if self._accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            raise DistributedError(
                f"{self._accelerator.distributed_type.value} is not supported yet · accelerate configuration · "
                "use one process or plain data parallel (configs/accelerate/ddp.yaml)"
            )
        wrapped, prepared = self._accelerator.prepare(model, optimizer)
        return wrapped, prepared

    def autocast(self) -> AbstractContextManager[None]:
        """Where the forward pass runs in bf16, if the run does."""
        return self._accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean of the ranks' losses."""
        self._accelerator.backward(loss)

    def close(self) -> None:
        """Leaves the process group."""
        self._accelerator.end_training()
