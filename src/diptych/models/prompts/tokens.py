"""Learned tokens beside those that the layers of a tower see, for any tower of repeated layers.

The tower is not changed: hooks put the tokens in front of a layer's input and take what became of them from its output,
so positions, pooling and whatever else happens outside of the layers see the tower's own tokens alone. Masks are
widened: all see the tokens; the tokens see what the first of the tower's own sees of those behind it (behind a causal
mask nothing but those before them, else all that is no padding).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.distributed.sharding import blocks
from diptych.errors import ConfigError, one_line

_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


class LayerTokens(nn.Module):
    """M tokens of width W in front of a layer's own.

    deep:     layer i sees [p_i, x_(i-1)]; what it makes of p_i is dropped                      p: [layers·M, W]
    carried:  layer 1 sees [p, x_0], each one behind it all that the one before made of them    p: [M, W]
    """

    def __init__(self, start: Float[Tensor, "N W"], length: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        # An embedding, so that its vectors do not decay.
        self.table = nn.Embedding.from_pretrained(start, freeze=False)
        self.length = length
        self.dropout = nn.Dropout(dropout)

    def attach(self, layers: Sequence[nn.Module]) -> None:
        """Puts them where they belong: deep into as many layers as there are tokens for, or carried through all."""
        deep = self.table.num_embeddings // self.length == len(layers)
        for number, layer in enumerate(layers):
            # Bound methods, no closures: a copy of the tower has hooks of its own tokens.
            enters = number if deep or number == 0 else None
            layer.register_forward_pre_hook(partial(self.enter, enters), with_kwargs=True)
            if deep or number == len(layers) - 1:
                layer.register_forward_hook(self.leave)

    def enter(
        self, number: int | None, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layer's input with tokens in front; none: they are there already, and masks alone are widened."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if number is not None:
            tokens = self.dropout(self.table.weight[number * self.length : (number + 1) * self.length])
            hidden = torch.cat([tokens.to(hidden.dtype).expand(len(hidden), -1, -1), hidden], 1)
        own = hidden.shape[1] - self.length
        others = {name: self._widened(value, own) for name, value in kwargs.items() if name != "hidden_states" or args}
        if args:
            return (hidden, *(self._widened(value, own) for value in args[1:])), others
        return (), others | {"hidden_states": hidden}

    def leave(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        """The layer's output without them."""
        if isinstance(output, tuple):
            return (output[0][:, self.length :], *output[1:])
        return output[:, self.length :]

    def _widened(self, value: Any, own: int) -> Any:
        is_mask = isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == own
        return widened(value, self.length) if is_mask else value


def widened(mask: Tensor, count: int) -> Tensor:
    """A mask of attention [..., L, L] or [..., 1, L] for `count` tokens more in front.

    Numbers are added to scores, so 0 lets see; of booleans True does.
    """
    seen: Any = True if mask.dtype == torch.bool else 0
    left = mask.new_full((*mask.shape[:-1], count), seen)
    if mask.shape[-2] != mask.shape[-1]:
        return torch.cat([left, mask], -1)
    # What the first sees of the second tells a causal mask; of itself it would see in any case.
    behind = mask[..., :1, 1:2]
    words = torch.cat([behind, mask[..., :1, 1:]], -1).expand(*mask.shape[:-2], count, -1)
    upper = torch.ones(count, count, dtype=torch.bool, device=mask.device).triu(1)
    corner = torch.where(upper, behind, mask.new_full((), seen))
    return torch.cat([torch.cat([corner, words], -1), torch.cat([left, mask], -1)], -2)


@dataclass(frozen=True)
class Entrance:
    """The layers of a tower that takes tokens."""

    layers: tuple[nn.Module, ...]
    """In the order in which they are called."""
    width: int


def entrance(tower: nn.Module, example: Tensor, *, where: str) -> Entrance:
    """The layers of a tower, as one pass of two rows shows them.

    Raises:
        ConfigError: it has none that repeat, or they pass on something else than tokens [B, L, W].
    """
    layers = [layer for layer in blocks(tower) if not any(True for _ in blocks(layer))]
    seen: list[tuple[nn.Module, Any]] = []

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((layer, args[0] if args else kwargs.get("hidden_states")))

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        _run(tower, example, where)
    finally:
        for handle in handles:
            handle.remove()
    shapes = {tuple(hidden.shape) if isinstance(hidden, Tensor) else () for _, hidden in seen}
    shape = next(iter(shapes), ())
    alike = len(shapes) == 1 and len(shape) == 3 and shape[0] == len(example)
    if not alike or len({id(layer) for layer, _ in seen}) < len(seen):
        raise ConfigError(
            f"the {where} ({type(tower).__name__}) has no layers that repeat and take tokens · model.adapters · "
            "use a transformer of two layers or more"
        )
    return Entrance(tuple(layer for layer, _ in seen), shape[2])


def install(tower: nn.Module, tokens: LayerTokens, layers: Sequence[nn.Module], example: Tensor, *, where: str) -> None:
    """Makes tokens a part of the tower. Raises ConfigError where its layers take no more of them."""
    if any(isinstance(module, LayerTokens) for module in tower.modules()):
        raise ConfigError(f"the {where} has learned tokens already · model.adapters · leave one of them out")
    tower.learned_tokens = tokens
    tokens.attach(layers)
    _run(tower, example, where)


@torch.no_grad()
def _run(tower: nn.Module, example: Tensor, where: str) -> None:
    was_training = tower.training
    try:
        tower.eval()(example)
    except _REFUSALS as error:
        raise ConfigError(
            f"the layers of the {where} ({type(tower).__name__}) take no more tokens ({one_line(error, 120)}) · "
            "model.adapters · use another tower"
        ) from error
    finally:
        tower.train(was_training)
