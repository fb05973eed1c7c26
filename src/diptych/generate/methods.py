"""Ways to choose words. Each takes captions without a word and gives ids [B, T]: behind a caption's end stands its end.

All sums are float32; `rules.scores` are log-probabilities.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.generate.rules import Rules
from diptych.generate.writer import Step, Writer


def greedy(writer: Writer, rules: Rules, device: torch.device) -> Int[Tensor, "B T"]:
    """The likeliest word each time."""
    written = Ids(writer, rules, device)
    for position in range(rules.max_length):
        if written.add(rules.scores(written.step(), position).argmax(1)):
            break
    return written.ids()


def sample(
    writer: Writer, rules: Rules, draws: Float[Tensor, "B max_length"], *, filters: tuple[float, int, float]
) -> Int[Tensor, "B T"]:
    """Words drawn by their probability.

    Args:
        draws: numbers in [0, 1), one for each word.
        filters: temperature, top_k (0: all), top_p.
    """
    written = Ids(writer, rules, draws.device)
    for position in range(rules.max_length):
        scores = rules.scores(written.step(), position)
        if written.add(drawn(scores, draws[:, position], filters)):
            break
    return written.ids()


def drawn(
    scores: Float[Tensor, "N V"], draws: Float[Tensor, " N"], filters: tuple[float, int, float]
) -> Int[Tensor, " N"]:
    """The word at which the sum of probabilities, from the likeliest on, passes the draw."""
    temperature, top_k, top_p = filters
    probabilities, words = (scores / temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    before = probabilities.cumsum(1) - probabilities
    kept = before < top_p
    if top_k:
        kept[:, top_k:] = False
    kept[:, 0] = True  # whatever rounding makes of top_p
    probabilities = probabilities * kept
    sums = probabilities.cumsum(1)
    place = (sums <= draws[:, None] * sums[:, -1:]).sum(1)
    last = (probabilities > 0).sum(1) - 1  # a draw that rounding brought to the very end
    return words.gather(1, torch.minimum(place, last)[:, None]).squeeze(1)


def contrastive(
    writer: Writer, rules: Rules, device: torch.device, *, candidates: int, penalty: float
) -> Int[Tensor, "B T"]:
    """Likely words unlike those before.

        argmax over the k likeliest words v of   (1 − α)·p(v) − α·max_j cos(h_v, h_j)

    h_v: what the decoder makes of v, h_j: of the start and of the words before. Source: arXiv:2202.06417, eq. 5.
    """
    written = Ids(writer, rules, device)
    count = writer.num_captions
    step = written.step()
    scores = rules.scores(step, 0)
    before = F.normalize(step.hidden.float(), dim=1)[:, None]
    rows = torch.arange(count, device=device)
    for position in range(rules.max_length):
        best, words = scores.topk(candidates, 1)
        writer.select(rows.repeat_interleave(candidates))
        step = writer.step(words.flatten())
        hidden = F.normalize(step.hidden.float(), dim=1).unflatten(0, (count, candidates))
        like = (hidden @ before.mT).amax(2)
        # Words that must not stand here have probability 0, and a likeness that could still win.
        merit = ((1 - penalty) * best.exp() - penalty * like).masked_fill(best == -torch.inf, -torch.inf)
        chosen = merit.argmax(1)
        if written.add(words.gather(1, chosen[:, None]).squeeze(1)) or position + 1 == rules.max_length:
            break
        taken = rows * candidates + chosen
        writer.select(taken)
        before = torch.cat([before, hidden[rows, chosen][:, None]], 1)
        early = step.early_logits
        step = Step(step.hidden[taken], step.logits[taken], early[taken] if early is not None else None)
        scores = rules.scores(step, position + 1)
    return written.ids()


class Ids:
    """One caption of each picture, word by word."""

    def __init__(self, writer: Writer, rules: Rules, device: torch.device) -> None:
        self._writer = writer
        self._end = rules.end
        self._done = torch.zeros(writer.num_captions, dtype=torch.bool, device=device)
        self._words: list[Tensor] = []

    def step(self) -> Step:
        """What is known of the word behind the newest one."""
        return self._writer.step(self._words[-1]) if self._words else self._writer.start()

    def add(self, words: Int[Tensor, " N"]) -> bool:
        """Whether all captions are at their end now."""
        newest = words.masked_fill(self._done, self._end)
        self._words.append(newest)
        self._done |= newest == self._end
        return bool(self._done.all())

    def ids(self) -> Int[Tensor, "N T"]:
        """All words."""
        return torch.stack(self._words, 1)
