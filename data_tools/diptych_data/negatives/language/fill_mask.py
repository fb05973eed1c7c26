"""A masked language model puts another word in the place of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diptych_data.negatives.language.family import Raw, Writer
from diptych_data.negatives.language.pretrained import load_model
from diptych_data.negatives.lexicon import read_lexicon
from diptych_data.negatives.phrase import parse
from diptych_data.negatives.words import Token, tokens_of


@dataclass(frozen=True)
class FillMask(Writer, name="fill_mask"):
    """Each content word is masked in turn; of the model's best words those become negatives that are words at all.

    Source: the generated negatives of DeGLA (arXiv:2504.16801) in their cheapest form.
    """

    model: str
    """Folder or hub name of a masked language model."""
    top_k: int = 8
    """Words taken for each mask."""
    masks: int = 4
    """Words of a caption that are masked at most, from its end: what a caption is of often stands there."""
    batch: int = 64
    """Texts in one forward pass."""
    device: str = "cpu"
    """Where the model runs."""

    def __post_init__(self) -> None:
        if min(self.top_k, self.masks, self.batch) < 1:
            raise ValueError("top_k, masks and batch must be at least 1")

    def load(self) -> Callable[[Sequence[str], int], list[list[Raw]]]:
        """The loaded model; it draws nothing, so seeds change nothing."""
        tokenizer, model = load_model(self.model, "fill_mask", self.device)

        def write(captions: Sequence[str], seed: int) -> list[list[Raw]]:
            found: list[list[Raw]] = [[] for _ in captions]
            jobs = [(number, *job) for number, text in enumerate(captions) for job in self._masked(text)]
            for first in range(0, len(jobs), self.batch):
                some = jobs[first : first + self.batch]
                masked = [text[: t.start] + tokenizer.mask_token + text[t.end :] for _, text, t, _ in some]
                for (number, text, token, type), words in zip(some, self._words(tokenizer, model, masked), strict=True):
                    found[number] += [Raw(text[: token.start] + word + text[token.end :], type) for word in words]
            return found

        return write

    def _masked(self, text: str) -> list[tuple[str, Token, str]]:
        lexicon = read_lexicon()
        types = {place: slot.type for slot in parse(text, lexicon).slots for place in range(slot.first, slot.last)}
        content = [
            (text, token, types.get(place, "word"))
            for place, token in enumerate(tokens_of(text))
            if token.is_word and token.low not in lexicon.function_words
        ]
        return content[-self.masks :]

    @torch.inference_mode()
    def _words(self, tokenizer: Any, model: Any, texts: Sequence[str]) -> list[list[str]]:
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True).to(model.device)
        logits = model(**inputs).logits
        is_mask = inputs["input_ids"] == tokenizer.mask_token_id
        # Where truncation took the mask away, the first place is looked at, and nothing is taken from it.
        places = is_mask.int().argmax(1)
        best = logits[torch.arange(len(texts), device=places.device), places].topk(min(self.top_k, logits.shape[-1]))
        return [
            [word for token in row if (word := tokenizer.decode([token]).strip()).isalpha()] if seen else []
            for row, seen in zip(best.indices.tolist(), is_mask.any(1).tolist(), strict=True)
        ]
