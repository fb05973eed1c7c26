"""CoCa, going on word by word, and computing nothing twice.

    per picture     keys and values of its tokens, once, for each cross-attention of the decoder    [B, H, P, W / H]
    per caption     keys and values of the words so far, for each layer of text tower and decoder   [N, H, T, W / H]

N = B·R captions, R of each picture side by side: the R captions are R queries of one cross-attention, so that what is
known of a picture is never copied. The modules are those of training; `next_word_logits` is the slow twin.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.generate.writer import Step, check_early_layer
from diptych.models.dual_encoder import DualEncoder


@dataclass
class _Memory:
    """Keys and values of the words so far in one layer."""

    keys: Float[Tensor, "N H T width"] | None = None
    values: Float[Tensor, "N H T width"] | None = None

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All that there are now."""
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        self.values = values if self.values is None else torch.cat([self.values, values], 2)
        return self.keys, self.values

    def select(self, rows: Tensor) -> None:
        """Those of other captions."""
        assert self.keys is not None, "there is a word before captions are chosen"
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


class CaptionWriter:
    """See Writer."""

    def __init__(
        self, model: DualEncoder, image_tokens: Float[Tensor, "B P W"], *, early_layer: int | None = None
    ) -> None:
        """
        Args:
            early_layer: number of a layer, from 1, whose logits are wanted too.

        Raises:
            ConfigError: the model writes no captions, its layers are of another kind, or have no such number.
        """
        self._text, self._decoder = _modules(model, early_layer)
        self._early_layer = early_layer
        self._start = model.spelling.start if model.spelling is not None else ()
        self.num_captions = len(image_tokens)
        self.length = 0
        """Words so far."""
        self._pictures = [_keys_and_values(cross, image_tokens) for cross in self._decoder.cross_attn]
        self._of_text = [_Memory() for _ in self._text.transformer.resblocks]
        self._of_decoder = [_Memory() for _ in self._decoder.resblocks]

    def start(self) -> Step:
        """See Writer."""
        (start,) = self._start
        return self.step(torch.full((self.num_captions,), start, device=self._text.token_embedding.weight.device))

    def step(self, ids: Int[Tensor, " N"]) -> Step:
        """See Writer. No word is padding (0)."""
        words = self._text.token_embedding(ids)[:, None] + self._text.positional_embedding[self.length]
        for block, memory in zip(self._text.transformer.resblocks, self._of_text, strict=True):
            words = _attend_to_words(block, words, memory)
        if self._text.cls_emb is None:  # the tower's tokens are normalised where its feature is one of them
            words = self._text.ln_final(words)
        early = None
        layers = zip(self._decoder.resblocks, self._decoder.cross_attn, self._of_decoder, self._pictures, strict=True)
        for number, (block, cross, memory, picture) in enumerate(layers, start=1):
            words = _attend_to_picture(cross, _attend_to_words(block, words, memory), picture)
            if number == self._early_layer:
                early = self._logits(self._decoder.ln_final(words[:, 0]))
        hidden = self._decoder.ln_final(words[:, 0])
        self.length += 1
        return Step(hidden, self._logits(hidden), early)

    def select(self, rows: Int[Tensor, " M"]) -> None:
        """See Writer."""
        for memory in (*self._of_text, *self._of_decoder):
            memory.select(rows)
        self.num_captions = len(rows)

    def _logits(self, hidden: Tensor) -> Tensor:
        return (hidden @ self._decoder.text_projection).float()


def _modules(model: DualEncoder, early_layer: int | None) -> tuple[Any, Any]:
    """Text tower and decoder, where they are such as can go on word by word."""
    text: Any = model.text_tower
    decoder: Any = model.text_decoder
    if model.text_decoder is None:
        raise ConfigError(
            "the model writes no captions · generate · use a captioner, such as one trained with "
            "model.towers.name=coca_ViT-B-32"
        )
    blocks = (*text.transformer.resblocks, *decoder.resblocks, *decoder.cross_attn)
    if not all(isinstance(block.attn, nn.MultiheadAttention) for block in blocks):
        raise ConfigError("layers of block_type `custom` cannot go on word by word · generate · use those of `default`")
    check_early_layer(early_layer, len(decoder.resblocks))
    return text, decoder


def _attend_to_words(block: Any, words: Float[Tensor, "N 1 W"], memory: _Memory) -> Float[Tensor, "N 1 W"]:
    """One layer of self-attention: the newest word sees all that are there."""
    attention = block.attn
    query, key, value = (
        _heads(attention, part)
        for part in F.linear(block.ln_1(words), attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    )
    return _finish(block, words, F.scaled_dot_product_attention(query, *memory.add(key, value)))


def _attend_to_picture(
    block: Any, words: Float[Tensor, "N 1 W"], picture: tuple[Tensor, Tensor]
) -> Float[Tensor, "N 1 W"]:
    """One layer of cross-attention: a picture's captions are its queries."""
    attention = block.attn
    count = len(picture[0])
    weight, bias = attention.in_proj_weight.chunk(3)[0], attention.in_proj_bias.chunk(3)[0]
    by_picture = F.linear(block.ln_1(words), weight, bias).unflatten(0, (count, -1)).squeeze(2)
    seen = F.scaled_dot_product_attention(_heads(attention, by_picture), *picture)
    return _finish(block, words, seen.transpose(1, 2).flatten(0, 1)[:, :, None])


def _keys_and_values(block: Any, image_tokens: Float[Tensor, "B P W"]) -> tuple[Tensor, Tensor]:
    attention = block.attn
    weight, bias = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    tokens = block.ln_1_kv(image_tokens)
    keys, values = (_heads(attention, F.linear(tokens, weight[i], bias[i])) for i in (1, 2))
    return keys, values


def _heads(attention: Any, tokens: Float[Tensor, "N L W"]) -> Float[Tensor, "N H L width"]:
    return tokens.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _finish(block: Any, words: Float[Tensor, "N 1 W"], seen: Float[Tensor, "N H 1 width"]) -> Float[Tensor, "N 1 W"]:
    """What follows attention in a layer."""
    words = words + block.ls_1(block.attn.out_proj(seen.transpose(1, 2).flatten(2)))
    found: Tensor = words + block.ls_2(block.mlp(block.ln_2(words)))
    return found
