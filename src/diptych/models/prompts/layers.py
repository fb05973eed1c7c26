"""Learned tokens in the layers of a tower, beside those of the text or the picture."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.distributed.sharding import blocks
from diptych.errors import ConfigError
from diptych.models.adapters.family import Adapter

if TYPE_CHECKING:
    from diptych.models.dual_encoder import DualEncoder

_START_STD = 0.02
_MASKS = ("attn_mask", "attention_mask")


@dataclass(frozen=True)
class LayerTokens(Adapter, name="layer_tokens"):
    """Soft tokens at the entrance of a transformer's layers, new ones for each, which drop out behind it.

    In the text tower before the words: SoftREPA (arXiv:2503.08250). In the image tower behind the patches: deep visual
    prompts (VPT, arXiv:2203.12119, section 3.2). The tower itself stays as it is.
    """

    tower: Literal["image", "text"] = "text"
    """Whose layers: those of a ViT, or of a text transformer."""
    length: int = 4
    """Tokens of a layer."""
    layers: int | None = None
    """The first so many layers; none: all."""

    def __post_init__(self) -> None:
        if self.length < 1 or (self.layers is not None and self.layers < 1):
            raise ValueError("length and layers must be at least 1")

    def apply(self, model: "DualEncoder") -> None:
        """See Adapter. Raises ConfigError where the tower is no transformer that can take more tokens."""
        tower = getattr(model, f"{self.tower}_tower")
        found = [block for block in blocks(tower) if not any(True for _ in blocks(block))]
        if self.layers is not None and self.layers > len(found):
            raise ConfigError(
                f"{self.layers} layers, and the tower has {len(found)} · model.adapters: layer_tokens.layers"
            )
        chosen = found[: self.layers]
        width = _width(chosen[0]) if chosen else None
        if width is None or any(_width(block) != width for block in chosen):
            raise ConfigError(
                f"the {self.tower} tower ({type(tower).__name__}) is no transformer of layers of one width · "
                "model.adapters: layer_tokens · use LoRA there"
            )
        tower.layer_tokens = Tokens(len(chosen), self.length, width, before=self.tower == "text")
        for number, block in enumerate(chosen):
            # Partials of bound methods: a deep copy of the tower (the averaged model) gets its own.
            block.register_forward_pre_hook(partial(tower.layer_tokens.enter, number), with_kwargs=True)
            block.register_forward_hook(tower.layer_tokens.leave)


def _width(block: nn.Module) -> int | None:
    norm = next((module for module in block.modules() if isinstance(module, nn.LayerNorm)), None)
    attends = any("attention" in type(module).__name__.lower() for module in block.modules())
    return int(norm.normalized_shape[0]) if norm is not None and attends else None


class Tokens(nn.Module):
    """What is learned, and how it gets in and out."""

    def __init__(self, layers: int, length: int, width: int, *, before: bool) -> None:
        super().__init__()
        self.length = length
        self.before = before
        """Before the tower's own tokens, where all of them see it behind a causal mask too; or behind them."""
        # An embedding, so that it does not decay.
        self.tokens = nn.Embedding(layers * length, width)
        nn.init.normal_(self.tokens.weight, std=_START_STD)

    def enter(
        self, layer: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Puts a layer's tokens beside [B, L, W], and lets all see them."""
        own = self.tokens.weight.view(-1, self.length, self.tokens.embedding_dim)[layer]
        states: Tensor = args[0]
        more = own.to(states.dtype).expand(len(states), -1, -1)
        whole = torch.cat([more, states] if self.before else [states, more], 1)
        masks = {name: self._wider(kwargs[name], states.shape[1]) for name in _MASKS if kwargs.get(name) is not None}
        return (whole, *(self._wider(arg, states.shape[1]) for arg in args[1:])), kwargs | masks

    def leave(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        """Takes them out again."""
        if isinstance(output, tuple):
            return (self._own(output[0]), *output[1:])
        return self._own(output)

    def _own(self, states: Tensor) -> Tensor:
        return states[:, self.length :] if self.before else states[:, : -self.length]

    def _wider(self, mask: Any, length: int) -> Any:
        """A mask [..., L or 1, L] with room for the tokens; anything else as it is."""
        if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.shape[-1] != length:
            return mask
        rows = self.length if mask.shape[-2] == length else 0
        pad = (self.length, 0, rows, 0) if self.before else (0, self.length, 0, rows)
        return F.pad(mask, pad, value=0.0) if mask.is_floating_point() else F.pad(mask, pad, value=True)
