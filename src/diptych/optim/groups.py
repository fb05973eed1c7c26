"""Which parameters decay, and at which rate each group learns."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor

from diptych.names import begins, check

_LAYER = re.compile(r"\.(?:resblocks|cross_attn|blocks|layers|layer|h)\.(\d+)\.")
# `pre_layrnorm` is how transformers spells it.
_STEM = re.compile(r"embed|conv1|patch|cls_token|ln_pre|norm_pre|pre_layrnorm|pre_layernorm")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike."""

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]
    decays: bool
    rate: float
    """What the learning rate is multiplied with."""


def split(
    *modules: nn.Module, rates: Mapping[str, float] | None = None, layer_decay: float | None = None
) -> list[ParameterGroup]:
    """Trainable parameters of all modules in groups: matrices decay; norms, biases, embeddings, scales do not.

    Norms, biases and scales are recognised by having fewer than two axes (or by being one number), embeddings by their
    module.

    Args:
        rates: beginning of a parameter's name → factor of its learning rate; the longest that fits counts.
        layer_decay: a tower's last layer learns at the full rate, each one below at this share of the one above.

    Raises:
        ConfigError: a name in `rates` is the beginning of no parameter.
    """
    parts = [part for module in modules for part in module.modules()]
    embeddings = {id(part.weight) for part in parts if isinstance(part, nn.Embedding)}
    named = [pair for module in modules for pair in module.named_parameters()]
    names = [name for name, _ in named]
    check(rates or (), names, where="optim.rates")
    depths = _depths(names)
    found: dict[tuple[bool, float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            keep = parameter.ndim < 2 or id(parameter) in embeddings or "positional_embedding" in name
            rate = _rate(name, rates or {}) * (layer_decay ** depths[name] if layer_decay is not None else 1.0)
            # Apart: torch's fused optimizers take divided parameters (FSDP2) or whole ones (an objective's), not both.
            found.setdefault((not keep, rate, isinstance(parameter, DTensor)), []).append((name, parameter))
    return [
        ParameterGroup("decay" if decays else "plain", tuple(parameters), decays, rate)
        for (decays, rate, _), parameters in sorted(found.items(), key=lambda item: (not item[0][0], -item[0][1]))
    ]


def _rate(name: str, rates: Mapping[str, float]) -> float:
    fitting = [prefix for prefix in rates if begins(name, prefix)]
    return rates[max(fitting, key=len)] if fitting else 1.0


def _depths(names: list[str]) -> dict[str, int]:
    """Name → layers of its tower above it: 0 in the last one, in what follows it, and outside of towers."""
    layers = {name: int(match[1]) for name in names if (match := _LAYER.search(name))}
    count: dict[str, int] = {}
    for name, layer in layers.items():
        tower = name.partition(".")[0]
        count[tower] = max(count.get(tower, 0), layer + 1)
    depths = {}
    for name in names:
        tower = name.partition(".")[0]
        if name in layers:
            depths[name] = count[tower] - 1 - layers[name]
        else:
            depths[name] = count.get(tower, 0) if _STEM.search(name) else 0
    return depths
