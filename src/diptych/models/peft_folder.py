"""LoRA in PEFT's layout: a few megabytes that change a model of many.

FOLDER/
  adapter_config.json          peft's settings; layers by the names that transformers' CLIPModel has for them
  adapter_model.safetensors    base_model.model.LAYER.lora_A.weight [rank, in], .lora_B.weight [out, rank]
  diptych.json                 the base by its name and a hash of its weights; logit scale and bias

peft opens it on the transformers model of the same weights, `diptych.load` on the base that it names. Towers that
transformers does not know keep their own names. Folders that peft itself wrote have no diptych.json.
"""

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.errors import CheckpointError, ConfigError, one_line
from diptych.models.adapters.attention import pack, unpack
from diptych.models.adapters.lora import Lora, merge_lora
from diptych.models.dual_encoder import DualEncoder
from diptych.models.towers.clip_names import TOWERS, renamed

CONFIG, _WEIGHTS, _OURS = "adapter_config.json", "adapter_model.safetensors", "diptych.json"
_PREFIX = "base_model.model."
_SHARED = ("dropout", "dora", "rslora")


def write(model: DualEncoder, folder: Path) -> None:
    """What LoRA learned.

    Raises:
        ConfigError: something else was learned too, or nothing opens the base by a name.
    """
    adapters = _lora_of(model)
    base = model.config.towers.reference()
    if base is None:
        raise ConfigError(
            "an adapter belongs to a base that has a name, and these towers are of none · model.towers · start from a "
            "run, a folder or published weights"
        )
    config = _merged_config(adapters)
    state: dict[str, Tensor] = {}
    for adapter in adapters:
        for tower in adapter.towers:
            part = getattr(model, tower)
            outside = _outside(model, tower)
            for layer, tensors in _learned(part).items():
                name = outside[layer]
                state |= {f"{_PREFIX}{name}.{key}": value for key, value in tensors.items()}
                config.target_modules.add(name)
                config.rank_pattern[name] = adapter.rank
                config.alpha_pattern[name] = adapter.alpha
    config.base_model_name_or_path = base.removeprefix("hf:")
    config.save_pretrained(folder)
    save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
    facts = {"base": base, "towers": base_hash(model), "logit_scale": float(model.logit_scale.detach())}
    if model.logit_bias is not None:
        facts["logit_bias"] = float(model.logit_bias.detach())
    (folder / _OURS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _lora_of(model: DualEncoder) -> list[Lora]:
    adapters = [adapter for adapter in model.config.adapters if isinstance(adapter, Lora)]
    others = [adapter.choice_name for adapter in model.config.adapters if not isinstance(adapter, Lora)]
    learned = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name and name not in ("logit_scale", "logit_bias")
    ]
    if others == ["class_names"]:  # has nothing that is learned
        others = []
    if not adapters or others or learned:
        what = ", ".join(others) or (learned[0] if learned else "nothing")
        raise ConfigError(f"PEFT's layout holds LoRA alone, here learned {what} · model.adapters · export otherwise")
    return adapters


def _merged_config(adapters: list[Lora]) -> Any:
    """One of peft's settings for all entries."""
    for key in _SHARED:
        if len({getattr(adapter, key) for adapter in adapters}) > 1:
            raise ConfigError(f"PEFT's layout has one {key} for all layers · model.adapters: lora · give all the same")
    config = adapters[0].peft_config(())
    config.target_modules = set()
    return config


def _learned(tower: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Layer → lora_A.weight and so on."""
    from peft import get_peft_model_state_dict

    found: dict[str, dict[str, Tensor]] = {}
    for name, value in get_peft_model_state_dict(tower).items():
        layer, mark, rest = name.partition(".lora_")
        found.setdefault(layer, {})[f"{mark[1:]}{rest}"] = value.detach().cpu().contiguous()
    return found


def _outside(model: DualEncoder, tower: str) -> dict[str, str]:
    """Name of a linear layer within a tower, its attention unpacked → what others call it."""
    from diptych.models.towers import hf

    part = getattr(model, tower)
    layers = {
        name.removesuffix(".base_layer") for name, module in part.named_modules() if isinstance(module, nn.Linear)
    }
    if isinstance(part, hf.ImageTower | hf.TextTower):
        return {name: name.removeprefix("model.") for name in layers}
    known = {name: renamed(tower, name) for name in layers}
    return {name: theirs if theirs != name else f"{tower}.{name}" for name, theirs in known.items()}


def base_hash(model: DualEncoder) -> str:
    """Of the towers' weights as they were without LoRA."""
    digest = hashlib.sha256()
    for tower in TOWERS:
        part = copy.deepcopy(getattr(model, tower))
        merge_lora(part, keep_base=True)
        pack(part)
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class AdapterFolder:
    """One that is to be opened."""

    folder: Path

    @property
    def base(self) -> str:
        """What it changes, as `diptych.load` calls it. Raises CheckpointError where it does not say."""
        theirs = self._config().base_model_name_or_path
        name = str(self._facts().get("base", theirs if theirs is None or Path(theirs).is_dir() else f"hf:{theirs}"))
        if not theirs:
            raise CheckpointError(f"the adapter names no base model · {self.folder / CONFIG} · write it there")
        if (Path(name) / CONFIG).is_file():
            raise CheckpointError(
                f"the adapter's base is an adapter itself ({name}) · {self.folder} · merge that first"
            )
        return name

    def apply(self, base: DualEncoder) -> DualEncoder:
        """The base with what the adapter learned in its weights; changed in place.

        Raises:
            CheckpointError: it belongs to another base, or cannot be read.
        """
        facts = self._facts()
        if "towers" in facts and facts["towers"] != base_hash(base):
            raise CheckpointError(
                f"the adapter was learned on other weights than those of {self.base} · {self.folder} · "
                "give it the base it was made for"
            )
        state = {name.removeprefix(_PREFIX): value for name, value in self._state().items()}
        used: set[str] = set()
        for tower in TOWERS:
            used |= self._apply(base, tower, state)
        if unused := sorted(state.keys() - used):
            raise CheckpointError(
                f"{len(unused)} of the adapter's {len(state)} weights have no layer in {self.base}, {unused[0]} the "
                f"first · {self.folder} · give it the base it was made for"
            )
        with torch.no_grad():
            for name in ("logit_scale", "logit_bias"):
                if name in facts and getattr(base, name) is not None:
                    getattr(base, name).fill_(facts[name])
        return base

    def _apply(self, base: DualEncoder, tower: str, state: dict[str, Tensor]) -> set[str]:
        """Changes one tower; which weights it took."""
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        part = getattr(base, tower)
        unpack(part)
        ours = {theirs: name for name, theirs in _outside(base, tower).items()}
        mine = {name: value for name, value in state.items() if name.partition(".lora_")[0] in ours}
        if mine:
            inject_adapter_in_model(self._config_of(ours, mine), part)
            local = {
                f"{ours[layer]}{mark}{rest}": value
                for name, value in mine.items()
                for layer, mark, rest in [name.partition(".lora_")]
            }
            try:
                set_peft_model_state_dict(part, local)
            except RuntimeError as error:
                raise CheckpointError(
                    f"weights do not fit the base ({one_line(error, 200)}) · {self.folder}"
                ) from error
            merge_lora(part)
        pack(part)
        return set(mine)

    def _config_of(self, ours: dict[str, str], state: dict[str, Tensor]) -> Any:
        """peft's settings for the layers of one tower, by its own names for them."""
        from peft.utils.other import get_pattern_key

        config = self._config()
        alphas, config.alpha_pattern, config.rank_pattern = config.alpha_pattern, {}, {}
        for name, value in state.items():
            layer, _, key = name.partition(".lora_")
            if key == "A.weight":
                config.rank_pattern[ours[layer]] = len(value)
                config.alpha_pattern[ours[layer]] = alphas.get(get_pattern_key(alphas, layer), config.lora_alpha)
        config.target_modules = set(config.rank_pattern)
        return config

    def _facts(self) -> dict[str, Any]:
        path = self.folder / _OURS
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"not readable ({one_line(error)}) · {path} · copy the adapter again") from error

    def _config(self) -> Any:
        from peft import LoraConfig, PeftConfig

        try:
            config = PeftConfig.from_pretrained(str(self.folder))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"not readable ({one_line(error)}) · {self.folder / CONFIG}") from error
        if not isinstance(config, LoraConfig):
            raise CheckpointError(f"an adapter of the kind {config.peft_type}, only LoRA is read · {self.folder}")
        return config

    def _state(self) -> dict[str, Tensor]:
        path = self.folder / _WEIGHTS
        if not path.is_file():
            raise CheckpointError(f"no {_WEIGHTS} · {self.folder} · adapters are read from safetensors only")
        try:
            return load_file(path)
        except Exception as error:  # whatever a damaged file makes of the reader
            raise CheckpointError(f"not readable ({one_line(error)}) · {path} · copy the adapter again") from error
