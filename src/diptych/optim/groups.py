"""Which parameters decay, and at which rate each group learns."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike."""

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]
    decays: bool


def split(*modules: nn.Module) -> list[ParameterGroup]:
    """Trainable parameters of all modules in two groups: matrices decay; norms, biases, embeddings, scales do not.

    Norms, biases and scales are recognised by having fewer than two axes, embeddings by their module.
    """
    parts = [part for module in modules for part in module.modules()]
    embeddings = {id(part.weight) for part in parts if isinstance(part, nn.Embedding)}
    decaying: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, parameter in (pair for module in modules for pair in module.named_parameters()):
        if parameter.requires_grad:
            keep = parameter.ndim < 2 or id(parameter) in embeddings or "positional_embedding" in name
            (plain if keep else decaying).append((name, parameter))
    groups = [
        ParameterGroup("decay", tuple(decaying), decays=True),
        ParameterGroup("plain", tuple(plain), decays=False),
    ]
    return [group for group in groups if group.parameters]
