"""Accelerate's door: how a model runs on one or many processes. Nothing else imports accelerate."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Literal, Self

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diptych.distributed import sharding, zero
from diptych.distributed.optimizer import Optimizer
from diptych.distributed.peers import Peers, watching
from diptych.distributed.runtime import Ranks
from diptych.errors import DistributedError

_TIMEOUT = datetime.timedelta(minutes=10)
_USES_ZERO = "ACCELERATE_USE_DEEPSPEED"
Way = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


class Engine:
    """This process of a run: its device, its rank, and how gradients are made and shared.

    `with Engine(…) as engine:` also watches the other ranks: where one dies, all end, and say which.
    """

    def __init__(self, precision: Literal["bf16", "fp32"]) -> None:
        """Joins the process group that a launcher announced, if one did.

        Raises:
            DistributedError: a launcher announced several ranks and the group has another size.
        """
        on_cpu = not torch.cuda.is_available()
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        self._zero = _zero_settings() if announced > 1 and os.environ.get(_USES_ZERO, "").lower() == "true" else None
        # Accelerate keeps the precision of the first run in a process for ever; a second run may want another.
        AcceleratorState._reset_state()
        group = InitProcessGroupKwargs(backend="gloo" if on_cpu else None, timeout=_TIMEOUT)
        with _without(_USES_ZERO):  # DeepSpeed is given the model alone; the group is made as it always is
            self._accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision="bf16" if precision == "bf16" else "no",
                kwargs_handlers=[group] if announced > 1 else [],
            )
        self._backward: Callable[[Tensor], object] = self._accelerator.backward
        self.ranks = Ranks(self._accelerator.process_index, self._accelerator.num_processes)
        self._way: Way = _way(self._accelerator.distributed_type, self.ranks.world_size)
        if self._zero is not None:
            self._way = self._zero.way
        if self.ranks.world_size != announced:
            raise DistributedError(
                f"{announced} processes were launched but the group has {self.ranks.world_size} · rank "
                f"{self.ranks.rank} · check the accelerate configuration"
            )

        self._watch: AbstractContextManager[Peers] = watching(self.ranks)
        self._peers: Peers | None = None

    def __enter__(self) -> Self:
        """Every rank must call."""
        self._peers = self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the process group.

        Raises:
            DistributedError: the error is due to another rank's end; the message names it.
        """
        self._watch.__exit__(kind, error, trace)
        if error is None:
            self.close()

    def first_alone(self) -> AbstractContextManager[None]:
        """Within, the first rank may work alone for as long as it likes; the others wait at the end. Every rank must
        call, within `with`."""
        assert self._peers is not None, "an engine that watches"
        return self._peers.first_alone()

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._accelerator.device

    @property
    def way(self) -> Way:
        """How a run is divided, as the accelerate configuration asks."""
        return self._way

    @property
    def divides_parameters(self) -> bool:
        """Whether no rank has all weights."""
        return self._way in ("fsdp2", "zero3")

    @property
    def _low_precision(self) -> bool:
        return self._accelerator.mixed_precision == "bf16"

    def shard(self, model: nn.Module, *untrained: nn.Module) -> None:
        """Divides the models' parameters among the ranks where the run asks for it; before the optimizer is built, for
        FSDP2 replaces parameters. (ZeRO divides what is trained in `wrap`.) Every rank must call."""
        if self._way == "fsdp2":
            for each in (model, *untrained):
                sharding.shard(
                    each,
                    device_type=self.device.type,
                    world_size=self.ranks.world_size,
                    low_precision=self._low_precision,
                )
        if self._zero is not None:
            for each in untrained:
                zero.divide(each, self._zero)

    def wrap(
        self, model: nn.Module, optimizer: Optimizer, *, local_batch: int, thaws: bool = False
    ) -> tuple[nn.Module, Optimizer]:
        """The model as the training step calls it: itself, or within what averages its gradients; and its optimizer.
        Every rank must call, with the same weights.

        Args:
            thaws: some of what learns does not do so all the time (plain DDP only).

        Raises:
            ConfigError: ZeRO cannot divide what this optimizer works on.
        """
        if self._zero is not None:
            wrapped, divided = zero.wrap(
                model, optimizer, self._zero, local_batch=local_batch, low_precision=self._low_precision
            )
            self._backward = wrapped.backward
            return wrapped, divided
        if self._way != "ddp":
            return model, optimizer
        devices = [self.device.index] if self.device.type == "cuda" else None
        # Else the loss sees to it that every parameter takes part; looking for those that do not would cost each step.
        wrapped = DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=thaws
        )
        return wrapped, optimizer

    def autocast(self) -> AbstractContextManager[None]:
        """Where the forward pass runs in bf16, if the run does."""
        return self._accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the mean of the ranks' losses. Under ZeRO, of what `wrap` was given last."""
        self._backward(loss)

    def close(self) -> None:
        """Leaves the process group."""
        self._accelerator.end_training()


def _zero_settings() -> zero.ZeroSettings:
    """Those that `accelerate launch` announces.

    Raises:
        DistributedError: DeepSpeed is not installed, or the stage is none of 1, 2, 3.
    """
    try:
        with zero.quiet():
            return zero.ZeroSettings(dict(DeepSpeedPlugin().deepspeed_config))
    except ImportError as error:
        raise DistributedError(
            "DeepSpeed is not installed · accelerate configuration · pip install 'diptych[deepspeed]', or use FSDP2"
        ) from error


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Within, an environment variable is not set."""
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


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
