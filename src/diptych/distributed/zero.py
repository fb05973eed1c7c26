"""DeepSpeed's ZeRO as one more way to divide a run. Nothing else imports deepspeed.

Stage 1 divides optimizer state among the ranks, stage 2 gradients too, stage 3 parameters as well. The update itself
stays torch's AdamW, on each rank's flat slices in float32; how a gradient is clipped and when an update is left out is
decided here, in the same way as everywhere, and not by DeepSpeed's own settings.
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.distributed.optimizer import Judge, Optimizer, Update, clip
from diptych.errors import ConfigError, DistributedError

_MOMENTS = ("exp_avg", "exp_avg_sq")
_OURS = ("optimizer", "scheduler", "fp16", "bf16", "gradient_clipping", "gradient_accumulation_steps")


@dataclass(frozen=True)
class ZeroSettings:
    """What a DeepSpeed configuration asks for."""

    config: dict[str, Any]

    def __post_init__(self) -> None:
        for key in _OURS:
            value = self.config.get(key)
            if isinstance(value, dict) and (key in ("optimizer", "scheduler") or value.get("enabled") is True):
                raise ConfigError(f"{key} is set in the run's YAML · DeepSpeed configuration · remove it there")
        if self.stage not in (1, 2, 3):
            raise DistributedError(
                f"ZeRO stage {self.stage} divides nothing · DeepSpeed configuration · use 1, 2 or 3, or plain DDP"
            )

    @property
    def stage(self) -> int:
        """1, 2 or 3."""
        return int(self.config["zero_optimization"]["stage"])

    @property
    def way(self) -> Literal["zero1", "zero2", "zero3"]:
        """The same, as a log calls it."""
        return cast(Literal["zero1", "zero2", "zero3"], f"zero{self.stage}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed speaks on stdout, which is for results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def wrap(
    model: nn.Module, optimizer: Optimizer, asked: ZeroSettings, *, local_batch: int, low_precision: bool
) -> tuple[Any, "ZeroOptimizer"]:
    """Divides a model and its optimizer in place. Every rank must call, with the same weights.

    Args:
        low_precision: run the forward pass in bf16; weights, gradients and optimizer state stay in float32.

    Returns:
        The model as the training step calls it, and the optimizer.

    Raises:
        ConfigError: the optimizer is not AdamW, or has parameters of others.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        raise ConfigError("ZeRO divides AdamW alone · optim.algorithm · use adamw, or plain DDP")
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # its flat slices are contiguous
    config = _config(asked, local_batch=local_batch) | {
        "torch_autocast": {"enabled": low_precision, "dtype": "bfloat16"},
    }
    named = [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
    reached = set(model.parameters())
    if foreign := [name for name, parameter in named if parameter not in reached]:
        raise ConfigError(
            f"ZeRO does not reach the objective's own parameters ({foreign[0]}) · objective · use DDP or FSDP2"
        )
    with quiet():
        import deepspeed

        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    return engine, ZeroOptimizer(engine, optimizer, named)


def divide(model: nn.Module, asked: ZeroSettings) -> None:
    """Divides the parameters of a model that is not trained, where the stage divides parameters."""
    if asked.stage != 3:
        return
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with quiet():
        import deepspeed

        deepspeed.initialize(model=model, config=_config(asked, local_batch=1), dist_init_required=False)


def _config(asked: ZeroSettings, *, local_batch: int) -> dict[str, Any]:
    theirs = {key: value for key, value in asked.config.items() if key not in (*_OURS, "train_batch_size")}
    return theirs | {
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": math.inf,
    }


class ZeroOptimizer:
    """What the loop asks of an optimizer, over a DeepSpeed engine. State is whole and by parameter where it is read or
    set, so that it fits every other way of dividing a run."""

    def __init__(self, engine: Any, inner: torch.optim.AdamW, named: list[tuple[str, nn.Parameter]]) -> None:
        self._engine, self._inner, self._named = engine, inner, named
        # From the start: DeepSpeed looks for the moments once, when torch has made those of the first group alone.
        for piece in _slices(engine.optimizer):
            moments = {key: torch.zeros_like(piece) for key in _MOMENTS}
            inner.state[piece] = {"step": torch.zeros((), device=piece.device), **moments}
        if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
            engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Torch's own, whose `params` are slices."""
        return self._inner.param_groups

    def update(self, max_norm: float | None, judge: Judge) -> Update:
        """Clips, and makes one update unless `judge` says that it is to be left out. Every rank must call."""
        found: list[Update] = []

        def before(*_: object) -> None:
            # DeepSpeed updates slice after slice; the verdict is one, of the whole gradient.
            if not found:
                norm = torch.as_tensor(self._engine.optimizer._global_grad_norm, device=self._engine.device).float()
                found.append(Update(norm, judge(norm)))
            norm, left_out = found[0]
            clip([p.grad for group in self._inner.param_groups for p in group["params"]], norm, max_norm)
            self._inner.found_inf = left_out.float()  # type: ignore[attr-defined]  # as GradScaler tells it

        hook = self._inner.register_step_pre_hook(before)
        self._engine.step()
        hook.remove()
        if not found:  # no number: DeepSpeed has left it out by itself
            norm = torch.tensor(math.inf, device=self._engine.device)
            found.append(Update(norm, judge(norm)))
        return found[0]

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors by number, on the processor. Every rank must call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._states[0]["step"].cpu()
        states: dict[int, dict[str, Tensor]] = {}
        for number, (_, parameter) in enumerate(self._named if step else ()):
            moments = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in _MOMENTS}
            states[number] = {"step": step} | {key: value.view(shape(parameter)) for key, value in moments.items()}
        return {"state": states, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        states = state_dict["state"]
        for number, state in states.items():
            parameter = self._named[number][1]
            for key in _MOMENTS:
                value = state[key].to(self._engine.device).contiguous()
                if is_divided(parameter):  # DeepSpeed's setter of whole values does not know the padding of odd sizes
                    safe_set_local_optimizer_state(parameter, _slice_of(value, parameter), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        if states:
            step = next(iter(states.values()))["step"]
            for its in self._states:
                its["step"].copy_(step)

    @property
    def _states(self) -> list[dict[str, Tensor]]:
        return [self._inner.state[piece] for piece in _slices(self._engine.optimizer)]


def _slices(optimizer: Any) -> list[Tensor]:
    """This rank's flat float32 slices: of stages 1 and 2, of stage 3."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise AssertionError("ZeRO keeps its slices elsewhere in this version of DeepSpeed")


def _slice_of(value: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole value, cut as stage 3 cuts: equal parts, the last ones filled up."""
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    padding = size * dist.get_world_size(group) - value.numel()
    return nn.functional.pad(value.flatten(), (0, padding)).narrow(0, size * dist.get_rank(group), size)


def shape(tensor: Tensor) -> torch.Size:
    """Of the whole, whoever holds it."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_divided(tensor: Tensor) -> bool:
    """Whether a parameter is DeepSpeed's, and this rank holds a slice of it (stage 3)."""
    return hasattr(tensor, "ds_id")


def has(tensor: Tensor) -> bool:
    """Whether a parameter is DeepSpeed's, in whatever stage."""
    return is_divided(tensor) or hasattr(tensor, "_hp_mapping")


def whole(parameter: Tensor) -> Tensor:
    """A divided parameter put together. Every rank must call."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def copies(parameter: Any) -> list[Tensor]:
    """What this rank holds of a parameter of DeepSpeed's beside its slice (stage 3) or the whole; shares its memory."""
    if not is_divided(parameter):
        return [] if parameter._hp_mapping is None else [parameter._hp_mapping.hp_fragment]
    from deepspeed.utils import safe_get_local_fp32_param

    updated = [safe_get_local_fp32_param(parameter)] if hasattr(parameter, "_z3_optimizer") else []
    return updated + ([parameter.detach()] if parameter.numel() else [])  # small ones stay whole everywhere


def take(parameter: Tensor, value: Tensor) -> None:
    """Sets a parameter of DeepSpeed's, and the slice that is updated. Every rank must call."""
    if not is_divided(parameter):
        parameter.detach().copy_(value)
        if parameter._hp_mapping is not None:  # type: ignore[attr-defined]
            parameter._hp_mapping.update_hp()  # type: ignore[attr-defined]
        return
    import deepspeed
    from deepspeed.utils import safe_set_local_fp32_param

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.detach().copy_(value)
    if hasattr(parameter, "_z3_optimizer"):
        safe_set_local_fp32_param(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]
