"""What makes a captioner of a language model: it foretells a caption behind soft tokens made from the picture.

    feature     words, end                          → the end's state, projected: no picture is seen
    captions    picture → n soft tokens, words      → logits of each word, the first one from the last soft token

The layers are the text tower's own, run once for each line; each word sees what stands before it. Its vocabulary is the
language model's: its head, or its embeddings where it uses them for both. Source: VladVA, arXiv:2412.04378.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.errors import ConfigError
from diptych.models.towers.family import Captioner, Spelling, TextTokenizer
from diptych.vocabulary import IGNORED, TokenLoss, token_losses


class PrefixDecoder(nn.Module):
    """Words of captions from soft tokens of the picture and the words before."""

    def __init__(self, model: Any, head: nn.Linear | None, *, embed_dim: int, num_tokens: int) -> None:
        """`model` is the text tower's, without its head; no head: the vocabulary is that of its embeddings."""
        super().__init__()
        self._model: tuple[Any] = (model,)  # in a tuple: parameters that two modules name would be saved twice
        self.num_tokens = num_tokens
        self.prefix = nn.Linear(embed_dim, num_tokens * int(model.get_input_embeddings().weight.shape[1]))
        self.head = head

    @property
    def model(self) -> Any:
        """The layers: the text tower's."""
        return self._model[0]

    @property
    def vocabulary(self) -> Float[Tensor, "W V"]:
        """States times this are logits."""
        weight: Tensor = (self.head if self.head is not None else self.model.get_input_embeddings()).weight
        return weight.T

    def soft_tokens(self, image_tokens: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B prefix W"]:
        """What stands for a picture before the words."""
        found: Tensor = self.prefix(image_tokens).unflatten(-1, (self.num_tokens, -1)).flatten(1, 2)
        return found

    def forward(
        self,
        image_tokens: Float[Tensor, "B 1 D"],
        words: Float[Tensor, "B before_last W"],
        targets: Int[Tensor, "B L"] | None = None,
        form: TokenLoss | None = None,
    ) -> Tensor:
        """Logits [B, L, V] of L words; or, where the right ones are given, the loss of each caption [B], summed.

        Args:
            image_tokens: the picture's feature.
            words: embeddings of all L words but the last, behind which nothing is foretold.
        """
        inputs = torch.cat([self.soft_tokens(image_tokens).to(words.dtype), words], 1)
        # No mask: behind a causal one, padding to the right changes nothing.
        hidden = self.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, self.num_tokens - 1 :]
        if targets is None or form is None:
            return hidden @ self.vocabulary
        losses = token_losses(hidden.flatten(0, 1), self.vocabulary, targets.flatten(), form)
        return losses.view(targets.shape).sum(1)


@dataclass(frozen=True)
class CaptionIds:
    """The right words of captions, as the language model numbers them."""

    before: int
    """Tokens that every text begins with: a start, the template."""
    behind: int
    """Tokens that every text ends with: the template, the end."""

    def __call__(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """Those of the caption and the one behind it; `IGNORED` in all other places, which are the same everywhere."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        first_behind = (tokens != 0).sum(1, keepdim=True) - self.behind
        return torch.where((places >= self.before) & (places <= first_behind), tokens - 1, IGNORED)


def captioner(whole: Any, tokenizer: TextTokenizer, theirs: Any, *, embed_dim: int, num_tokens: int) -> Captioner:
    """What makes a captioner of a language model with its head.

    Args:
        tokenizer: `theirs`, transformers', as the text tower uses it.

    Raises:
        ConfigError: the head is no matrix, or texts have no room for a caption.
    """
    model, head = whole.base_model, whole.get_output_embeddings()
    _check_head(whole)
    before, behind = _frame(tokenizer)
    tied = head.weight is model.get_input_embeddings().weight
    decoder = PrefixDecoder(model, None if tied else head, embed_dim=embed_dim, num_tokens=num_tokens)
    no_words = {*theirs.all_special_ids, *range(len(theirs), len(head.weight))} - {behind[0]}
    spelling = Spelling(
        start=before,
        end=behind[0],
        room=tokenizer.context_length - len(before) - len(behind) + 1,
        banned=tuple(sorted(no_words)),
        text=lambda ids: str(theirs.decode(list(ids), skip_special_tokens=True)).strip(),
    )
    return Captioner(decoder, spelling, targets=CaptionIds(len(before), len(behind)))


@torch.no_grad()
def _check_head(whole: Any) -> None:
    """Raises ConfigError unless logits are the states of embedded words times a matrix: some models cap or scale them,
    have a bias, or see ids beside embeddings."""
    whole.eval()
    ids = torch.arange(4)[None] % whole.config.vocab_size
    embedded = whole.base_model.get_input_embeddings()(ids)
    hidden = whole.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    theirs, ours = whole(input_ids=ids, use_cache=False).logits, hidden @ whole.get_output_embeddings().weight.T
    if theirs.shape != ours.shape or (theirs - ours).abs().max() > 1e-3 * theirs.abs().max():
        raise ConfigError(
            f"logits of {whole.config.model_type!r} are more than states times a matrix · model.towers.prefix_tokens · "
            "set it to 0, or name another model"
        )


def _frame(tokenizer: TextTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and behind every caption, as the language model numbers them: what a text without words shares
    with one that has some. Raises ConfigError where there is no room for any."""
    empty, some = ([id - 1 for id in row.tolist() if id] for row in tokenizer(["", "a"]))
    if empty == some:
        raise ConfigError(
            f"with the template, {tokenizer.context_length} tokens have no room for a caption · "
            "model.towers.context_length · raise it, or shorten the template"
        )
    before = _alike(empty, some)
    behind = min(_alike(empty[::-1], some[::-1]), len(empty) - before)
    return tuple(empty[:before]), tuple(empty[len(empty) - behind :])


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two rows begin with that are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
