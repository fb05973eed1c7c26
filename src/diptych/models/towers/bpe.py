"""CLIP's byte-pair tokeniser at the speed of a dictionary: open_clip's own, with what it gives for a word remembered.

Captions hardly ever repeat, their words do. So the text is cleaned and divided as open_clip does it, and each piece's
ids are looked up; a piece that is new goes through open_clip's merges. The ids are open_clip's by construction.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

_PIECES = 1 << 17
"""Remembered pieces, some twenty megabytes: the words of a billion captions never end."""


class BpeTokenizer:
    """Ids as `open_clip.SimpleTokenizer` gives them.

    Args:
        tokenizer: an `open_clip.SimpleTokenizer` without reduction mask.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.context_length = context_length
        self._theirs = tokenizer
        self._lower = tokenizer.clean_fn.__name__ == "_clean_lower"
        self._special = frozenset(tokenizer.cache)
        self._ids = lru_cache(maxsize=_PIECES)(self._merge)

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Ids [B, context_length], padded with 0; longer captions end in the end-of-text token all the same."""
        found = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(found, texts, strict=True):
            ids = [self._theirs.sot_token_id]
            for piece in self._theirs.pat.findall(self._clean(text)):
                ids += self._ids(piece)
            ids = [*ids[: self.context_length - 1], self._theirs.eot_token_id]
            row[: len(ids)] = ids
        return torch.from_numpy(found)

    def word(self, row: int) -> str:
        """See TextTokenizer."""
        return str(self._theirs.decode([row])).strip()

    def _clean(self, text: str) -> str:
        # What is repaired there (encodings, entities, curly quotes) does not occur in such a text.
        if self._lower and text.isascii() and text.isprintable() and "&" not in text:
            return " ".join(text.split()).lower()
        return self._theirs.clean_fn(text)

    def _merge(self, piece: str) -> tuple[int, ...]:
        encoded = "".join(self._theirs.byte_encoder[byte] for byte in piece.encode("utf-8"))
        ids = tuple(self._theirs.encoder[part] for part in self._theirs.bpe(encoded).split(" "))
        if encoded not in self._special:
            self._theirs.cache.pop(encoded, None)  # it would grow for as long as there are new words
        return ids
