"""Low-rank changes of a tower's linear layers, through peft."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from diptych.distributed import sharding
from diptych.errors import ConfigError, one_line
from diptych.models.adapters.attention import pack, unpack
from diptych.models.adapters.family import Adapter

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_NAMES = (
    *("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "qkv"),
    *("c_fc", "c_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj"),
)
"""What towers of open_clip, timm and transformers call the layers of attention and of the network behind it."""


@dataclass(frozen=True)
class Lora(Adapter, name="lora"):
    """Learns W + (alpha / rank)·B·A in place of W, for some linear layers of a tower (arXiv:2106.09685). B starts at 0:
    the features at the start are the model's own."""

    tower: Literal["image", "text", "both"] = "both"
    """Which tower's layers; two entries give each tower its own rank."""
    rank: int = 8
    """Of A [rank, in] and B [out, rank]."""
    alpha: float = 16.0
    """The change counts alpha / rank times."""
    dropout: float = 0.0
    """Of what goes into A, in [0, 1)."""
    targets: tuple[str, ...] = ()
    """The layers: the last part of their names (`q_proj`), or a regular expression for the whole name. open_clip's
    packed attention has `q_proj`, `k_proj`, `v_proj` and `out_proj`. None: all of attention and of the network behind
    it."""
    dora: bool = False
    """Learn length and direction of each weight apart (DoRA, arXiv:2402.09353)."""
    rslora: bool = False
    """The change counts alpha / sqrt(rank) times (arXiv:2312.03732): higher ranks stay useful."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    def apply(self, model: "DualEncoder") -> None:
        """See Adapter. Raises ConfigError where a target is no layer of the tower."""
        for name in self.towers:
            tower = getattr(model, name)
            unpack(tower)
            self._inject(tower, name)

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the model's modules that it changes."""
        return ("image_tower", "text_tower") if self.tower == "both" else (f"{self.tower}_tower",)

    def _inject(self, tower: nn.Module, name: str) -> None:
        from peft import inject_adapter_in_model

        targets = self.layers(tower, name)
        trained = {parameter for parameter in tower.parameters() if parameter.requires_grad}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # see merge_lora
                inject_adapter_in_model(self.peft_config(targets), tower)
        except ValueError as error:
            raise ConfigError(f"peft refuses ({one_line(error, 200)}) · model.adapters: lora · {name}") from error
        for parameter in trained:  # peft freezes all that is not its own; model.unfrozen says otherwise
            parameter.requires_grad = True

    def layers(self, tower: nn.Module, where: str) -> list[str]:
        """The full names of the layers that are changed. Raises ConfigError for a target that is none."""
        linear = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
        for target in self.targets:
            if not any(_fits(name, target) for name in linear):
                last = sorted({name.rpartition(".")[2] for name in linear})
                raise ConfigError(
                    f"{target!r} is no linear layer of the {where} · model.adapters: lora.targets · there are: "
                    f"{', '.join(last)}"
                )
        found = [name for name in linear if any(_fits(name, target) for target in self.targets or _NAMES)]
        if not found:
            raise ConfigError(
                f"the {where} has no linear layers of the usual names · model.adapters: lora.targets · name them"
            )
        return found

    def peft_config(self, targets: Sequence[str]) -> Any:
        """peft's own settings for the same."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft divides it; it need not be whole
            lora_dropout=self.dropout,
            target_modules=list(targets),
            use_dora=self.dora,
            use_rslora=self.rslora,
            bias="none",
        )

    def merge(self, model: "DualEncoder") -> None:
        """See Adapter; the attention is packed again."""
        for name in self.towers:
            merge_lora(getattr(model, name))
            pack(getattr(model, name))


def merge_lora(tower: nn.Module, *, keep_base: bool = False) -> None:
    """Leaves plain layers with what was learned in their weights, or as they were without it.

    Raises:
        ConfigError: the weights are compressed.
    """
    from peft.tuners.lora import LoraLayer

    for parent in list(tower.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, LoraLayer):
                if sharding.is_compressed(module.get_base_layer().weight):
                    raise ConfigError("compressed weights take nothing in · model.adapters · open the finished run")
                if not keep_base:
                    module.merge(safe_merge=True)
                setattr(parent, child, module.get_base_layer())
    if hasattr(tower, "peft_config"):
        del tower.peft_config  # by which peft would know of an adapter that is no longer there


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or re.fullmatch(target, name) is not None
