"""What a run is at a moment: weights, optimizer, average, position in the data. Turned into a checkpoint and back."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from diptych import checkpoint
from diptych.checkpoint import Snapshot
from diptych.data.batch import Batch, Cursors
from diptych.data.faults import FaultLog
from diptych.distributed import sharding
from diptych.distributed.collectives import gather_objects
from diptych.distributed.optimizer import Optimizer
from diptych.distributed.runtime import launched_ranks
from diptych.errors import CheckpointError, one_line
from diptych.losses.objective import Objective
from diptych.models.dual_encoder import DualEncoder
from diptych.models.ema import Ema
from diptych.models.teacher import Teacher
from diptych.train.guard import Guard


@dataclass
class TrainState:
    """The moving parts of a run; everything else follows from the recipe."""

    model: DualEncoder
    wrapped: nn.Module
    """The model as a step calls it: itself, or within what shares gradients with other ranks."""
    objective: Objective
    """Its plugs may have state (queues, tables of samples) and parameters."""
    optimizer: Optimizer
    ema: Ema[DualEncoder] | None
    guard: Guard
    teacher: Teacher | None = None
    """In no checkpoint: it follows from the recipe, and does not change."""
    step: int = 0
    samples_seen: int = 0
    cursors: Cursors | None = None
    """Where this rank's lanes stand after the batches consumed (not those prefetched)."""
    faults: FaultLog = field(default_factory=FaultLog)
    """Of all ranks, as of the last `collect_faults`; the same on every rank."""
    new_faults: FaultLog = field(default_factory=FaultLog)
    """Of this rank, since then."""

    def advance(self, batch: Batch, *, samples: int) -> None:
        """One optimizer step has consumed one global batch of `samples`, of which `batch` is this rank's part."""
        self.step += 1
        self.samples_seen += samples
        self.cursors = batch.cursors
        self.new_faults.add(len(batch.keys), batch.faults)

    def collect_faults(self) -> FaultLog:
        """Adds up the ranks' counts. Every rank must call."""
        for part in gather_objects(self.new_faults):
            self.faults.merge(part)
        self.new_faults = FaultLog()
        return self.faults

    def snapshot(self) -> Snapshot:
        """A checkpoint's contents, whole on the CPU. Every rank must call: what ranks hold apart is put together; the
        tensors are the first rank's, the other ranks' are empty."""
        consumed = [part for part in gather_objects(self.cursors) if part is not None]
        cursors = Cursors.merge(consumed) if consumed else Cursors()
        keep = launched_ranks().is_main
        tensors = {
            "model": whole_weights(weights_of(self.model), keep=keep),
            "optimizer": whole_weights(self._optimizer_tensors(), keep=keep),
        }
        state = {"step": self.step, "samples_seen": self.samples_seen, "cursors": cursors.to_json()}
        state["guard"] = self.guard.to_json()
        state["faults"] = self.collect_faults().to_json()
        if objective := self.objective.whole_state():
            tensors["objective"] = whole_weights(objective, keep=keep)
        if self.ema is not None:
            tensors["ema"] = whole_weights(weights_of(self.ema.model), keep=keep)
            state["ema_updates"] = self.ema.num_updates
        return Snapshot(tensors, state)

    def restore(self, snapshot: Snapshot, *, source: Path) -> None:
        """Takes over a checkpoint's contents.

        Raises:
            CheckpointError: it belongs to a model with other parameters.
        """
        try:
            sharding.fill(self.model, snapshot.tensors["model"])
            if self.ema is not None:
                sharding.fill(self.ema.model, snapshot.tensors["ema"])
                self.ema.num_updates = snapshot.state["ema_updates"]
            self._restore_optimizer(snapshot.tensors["optimizer"])
        except (RuntimeError, KeyError) as error:
            reason = one_line(error, 200)
            raise CheckpointError(f"checkpoint is of a different model ({reason}) · {source}") from error
        try:
            self.objective.take_state(snapshot.tensors.get("objective", {}))
        except (RuntimeError, KeyError) as error:
            reason = one_line(error, 200)
            raise CheckpointError(f"checkpoint is of a different objective ({reason}) · {source}") from error
        self.step = snapshot.state["step"]
        self.samples_seen = snapshot.state["samples_seen"]
        self.cursors = Cursors.from_json(snapshot.state["cursors"])
        self.faults = FaultLog.from_json(snapshot.state["faults"])
        self.guard.take(snapshot.state["guard"])

    def _numbered_names(self) -> list[str]:
        """Those of the parameters in the order in which the optimizer numbers them."""
        return [name for group in self.optimizer.param_groups for name in group["names"]]

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        states = self.optimizer.state_dict()["state"]
        names = self._numbered_names()
        return {f"{names[i]}/{key}": value for i, state in states.items() for key, value in state.items()}

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        packed = self.optimizer.state_dict()
        parameters = dict(self.model.named_parameters()) | dict(self.objective.named_parameters())
        position = {name: i for i, name in enumerate(self._numbered_names())}
        states: dict[int, dict[str, Tensor]] = {}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            parameter = parameters[name]
            # Fused optimizers walk parameter and state in memory order, so both need the same one (channels last, say).
            same_form = sharding.like(value, parameter) if value.shape == parameter.shape else value
            states.setdefault(position[name], {})[key] = same_form
        self.optimizer.load_state_dict({"state": states, "param_groups": packed["param_groups"]})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each of them perhaps this rank's slice."""
    found: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return found


def whole_weights(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """One tensor after another, so that no more than one is in memory twice. Every rank must call."""
    found = {}
    for name, tensor in tensors.items():
        value = sharding.whole(tensor).detach()
        if keep:
            # A copy, whatever the device: it is written while the run goes on.
            found[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value)
    return found


def restore_newest(folder: Path, state: TrainState) -> bool:
    """Continues from the newest intact checkpoint in `folder`, if there is one; says whether it did."""
    found = checkpoint.newest(folder)
    if found is None:
        return False
    state.restore(checkpoint.load(found), source=found)
    return True
