"""A language model that goes on word by word behind soft tokens of a picture, and computes nothing twice.

    per caption     transformers' own cache: what each layer keeps of picture, start and words so far

The layers are those of training; `next_word_logits` is the slow twin.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.generate.writer import Step, check_early_layer
from diptych.models.dual_encoder import DualEncoder


class PrefixWriter:
    """See Writer."""

    def __init__(
        self, model: DualEncoder, image_tokens: Float[Tensor, "B 1 D"], *, early_layer: int | None = None
    ) -> None:
        """
        Args:
            image_tokens: the pictures' features.
            early_layer: number of a layer, from 1, whose logits are wanted too.

        Raises:
            ConfigError: the model keeps nothing of its words, or has no layer of such a number.
        """
        decoder: Any = model.text_decoder
        assert model.spelling is not None, "whoever has a decoder can spell"
        self._decoder, self._layers = decoder, decoder.model
        self._cache_name = _cache_name(self._layers)
        self._early = _layer_and_norm(self._layers, early_layer) if early_layer is not None else None
        self._pictures = image_tokens
        self._start = torch.tensor(model.spelling.start, dtype=torch.long, device=image_tokens.device)
        self._cache: Any = None
        self.num_captions = len(image_tokens)

    def start(self) -> Step:
        """See Writer."""
        words = self._embedded(self._start.expand(self.num_captions, -1))
        soft = self._decoder.soft_tokens(self._pictures)
        return self._go_on(torch.cat([soft.to(words.dtype), words], 1))

    def step(self, ids: Int[Tensor, " N"]) -> Step:
        """See Writer."""
        return self._go_on(self._embedded(ids[:, None]))

    def select(self, rows: Int[Tensor, " M"]) -> None:
        """See Writer."""
        self._cache.reorder_cache(rows)
        self.num_captions = len(rows)

    def _embedded(self, ids: Int[Tensor, "N T"]) -> Float[Tensor, "N T W"]:
        found: Tensor = self._layers.get_input_embeddings()(ids)
        return found

    def _go_on(self, inputs: Float[Tensor, "N T W"]) -> Step:
        # No mask: all captions are as long as one another.
        keys = {"inputs_embeds": inputs, self._cache_name: self._cache, "use_cache": True}
        if self._early is None:
            found, early = self._layers(**keys), None
        else:
            layer, norm = self._early
            with _heard(layer) as states:
                found = self._layers(**keys)
            early = self._logits(norm(states[0][:, -1]))
        self._cache = found[self._cache_name]
        hidden = found.last_hidden_state[:, -1]
        return Step(hidden, self._logits(hidden), early)

    def _logits(self, hidden: Float[Tensor, "N W"]) -> Float[Tensor, "N V"]:
        logits: Tensor = hidden @ self._decoder.vocabulary
        return logits.float()


def _cache_name(model: Any) -> str:
    """How the model calls what it keeps of its words, which differs by transformers' version. Raises ConfigError."""
    known = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in known:
            return name
    raise ConfigError(
        f"{model.config.model_type!r} cannot go on word by word, it has no cache that captions share · generate · "
        "caption with a model such as GPT-2, Llama, Qwen"
    )


def _layer_and_norm(model: Any, number: int) -> tuple[nn.Module, nn.Module]:
    """A layer below the last, and what stands behind the last. Raises ConfigError where they are not known."""
    parts = [part for part in model.children() if any(True for _ in part.parameters())]
    layers = [part for part in parts if isinstance(part, nn.ModuleList)]
    if len(layers) != 1 or any(parameter.ndim > 1 for parameter in parts[-1].parameters()):
        raise ConfigError(
            f"the layers of {model.config.model_type!r} and the norm behind them are not known · generate: "
            "layer_contrast · leave it out"
        )
    check_early_layer(number, len(layers[0]))
    return layers[0][number - 1], parts[-1]


@contextmanager
def _heard(layer: nn.Module) -> Iterator[list[Float[Tensor, "N T W"]]]:
    """What the layer gives while the context lasts."""
    states: list[Tensor] = []

    def listen(_: nn.Module, __: object, found: Any) -> None:
        states.append(found[0] if isinstance(found, tuple) else found)

    handle = layer.register_forward_hook(listen)
    try:
        yield states
    finally:
        handle.remove()
