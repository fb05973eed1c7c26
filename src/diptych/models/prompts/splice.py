"""Embeddings of one's own at some places of a text, for any text tower.

A prompt is written with `SLOT` where a learned vector belongs: "SLOT SLOT SLOT dog". For the tower a filler word stands
there; when the tower looks up the words' embeddings, those of the fillers are replaced. So whatever the tower does
behind that (positions, masks, pooling at the end of the text) it does as with words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.towers.family import TextTokenizer

SLOT = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Where a learned vector stands in a prompt, a word of its own."""
_FILLERS = ("x", "a", "of", "the", "photo", "in", "on", "and")
"""Words that may stand there meanwhile: two of them, of one token each. Where their ids differ is where slots are."""


@dataclass(frozen=True)
class Slotted:
    """Prompts as token ids, each with the same number of places for vectors."""

    tokens: Int[Tensor, "N L"]
    places: Int[Tensor, "N M"]
    """Where in a row, in order."""

    def to(self, device: torch.device) -> "Slotted":
        """On a device."""
        return Slotted(self.tokens.to(device), self.places.to(device))


def slotted(tokenizer: TextTokenizer, prompts: Sequence[str]) -> Slotted:
    """Token ids of prompts that each hold the same number of `SLOT`s.

    Raises:
        ConfigError: a prompt does not fit into the tower's context, or this tokenizer makes no single tokens of common
            words.
    """
    first, second = (tokenizer([prompt.replace(SLOT, filler) for prompt in prompts]) for filler in _fillers(tokenizer))
    wanted = {prompt.count(SLOT) for prompt in prompts}
    assert len(wanted) == 1, "the caller writes all prompts alike"
    count = wanted.pop()
    _check_fit(tokenizer, prompts, first)
    found = first != second
    if not bool((found.sum(1) == count).all()):
        row = int((found.sum(1) != count).int().argmax())
        raise ConfigError(
            f"the tokenizer finds {int(found[row].sum())} places for {count} vectors in "
            f"{prompts[row].replace(SLOT, '_')!r} · model.adapters · use fewer, or another text tower"
        )
    used = int((first != 0).any(0).nonzero().max()) + 1
    return Slotted(first[:, :used], found.nonzero()[:, 1].view(len(prompts), count))


def _fillers(tokenizer: TextTokenizer) -> tuple[str, str]:
    """Two words of one token each. Raises ConfigError where the tokenizer knows none."""
    known: dict[int, str] = {}
    for word in _FILLERS:
        ids = word_ids(tokenizer, word)
        if len(ids) == 1:
            known.setdefault(int(ids[0]), word)
    if len(known) < 2:
        raise ConfigError("the tokenizer knows no common words · model.adapters · use another text tower")
    first, second, *_ = known.values()
    return first, second


def _check_fit(tokenizer: TextTokenizer, prompts: Sequence[str], tokens: Int[Tensor, "N L"]) -> None:
    """Raises ConfigError for a prompt that was cut: one word more would change nothing."""
    first, second = _fillers(tokenizer)
    full = [row for row in range(len(prompts)) if bool((tokens[row] != 0).all())]
    if not full:
        return
    longer = tokenizer([f"{prompts[row].replace(SLOT, first)} {second}" for row in full])
    cut = [row for row, more in zip(full, longer, strict=True) if torch.equal(more, tokens[row])]
    if cut:
        raise ConfigError(
            f"{prompts[cut[0]].replace(SLOT, '_')!r} does not fit into {tokenizer.context_length} tokens · "
            "model.adapters · use fewer context vectors, or a shorter class name"
        )


def vocabulary(tower: nn.Module) -> nn.Embedding:
    """The module in which a text tower looks up its words: of all embeddings the one with most rows (positions are
    few). Raises ConfigError where there is none."""
    found = [module for module in tower.modules() if isinstance(module, nn.Embedding)]
    if not found:
        raise ConfigError(f"{type(tower).__name__} has no embeddings of words · model.adapters · use another tower")
    return max(found, key=lambda module: module.num_embeddings)


def spliced(tower: nn.Module, prompts: Slotted, vectors: Float[Tensor, "N M W"]) -> Float[Tensor, "N D"]:
    """What the tower gives for the prompts with the vectors in their places; not normalised."""
    handle = vocabulary(tower).register_forward_hook(partial(_put, prompts.places, vectors))
    try:
        found: Tensor = tower(prompts.tokens)
        return found
    finally:
        handle.remove()


def _put(places: Tensor, vectors: Tensor, _module: nn.Module, _args: Any, looked_up: Tensor) -> Tensor:
    where = places[..., None].expand(-1, -1, looked_up.shape[-1])
    return looked_up.scatter(1, where, vectors.to(looked_up.dtype))


def word_ids(tokenizer: TextTokenizer, words: str) -> Int[Tensor, " n"]:
    """The ids of words alone: without what the tokenizer puts before and behind every text."""
    ids, empty = (row[: int(row.nonzero().max()) + 1] for row in (tokenizer([words])[0], tokenizer([""])[0]))
    before = 0
    while before < min(len(ids), len(empty)) and ids[before] == empty[before]:
        before += 1
    return ids[before : len(ids) - (len(empty) - before)]


@torch.no_grad()
def word_vectors(tower: nn.Module, tokenizer: TextTokenizer, words: str) -> Float[Tensor, "n W"]:
    """The embeddings that the tower looks up for some words, one per token."""
    ids = word_ids(tokenizer, words)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, looked_up: Tensor) -> None:
        seen.append(looked_up)

    handle = vocabulary(tower).register_forward_hook(keep)
    try:
        tower(tokenizer([words]).to(next(tower.parameters()).device))
    finally:
        handle.remove()
    start = _first_word(tokenizer)
    return seen[0][0, start : start + len(ids)].detach().clone()


def _first_word(tokenizer: TextTokenizer) -> int:
    ids, empty = tokenizer(["x"])[0], tokenizer([""])[0]
    return int((ids != empty).int().argmax())
