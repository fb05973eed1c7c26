"""Several captions of a picture at once, of which the likeliest is kept."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych.generate.rules import Rules
from diptych.generate.writer import Writer


def beam(
    writer: Writer, rules: Rules, device: torch.device, *, beams: int, length_penalty: float
) -> Int[Tensor, "B T"]:
    """Of all captions followed, the one with the highest log-probability over length ** length_penalty.

    Each step makes the 2R best continuations of a picture's R captions. Of the R best, those that end are finished;
    the R best that do not end go on. A picture is done when R are finished, or none that goes on can become better.
    """
    search = _Search(rules, writer.num_captions, beams, length_penalty, device)
    scores = rules.scores(writer.start(), 0).repeat_interleave(beams, 0)
    writer.select(torch.arange(writer.num_captions, device=device).repeat_interleave(beams))
    for position in range(rules.max_length):
        rows, ids = search.go_on(scores.unflatten(0, (-1, beams)), position)
        if position + 1 == rules.max_length or search.all_done():
            break
        writer.select(rows)
        scores = rules.scores(writer.step(ids), position + 1)
    return search.best(position + 1)


class _Search:
    """R captions of each of B pictures, and the best finished one."""

    def __init__(self, rules: Rules, pictures: int, beams: int, length_penalty: float, device: torch.device) -> None:
        self._rules, self._beams, self._penalty = rules, beams, length_penalty
        self._sums = torch.full((pictures, beams), -torch.inf, device=device)
        self._sums[:, 0] = 0.0  # at first all captions are one and the same
        self._words = torch.full((pictures, beams, rules.max_length), rules.end, device=device)
        self._best = torch.full((pictures,), -torch.inf, device=device)
        self._best_words = torch.full((pictures, rules.max_length), rules.end, device=device)
        self._finished = torch.zeros(pictures, dtype=torch.long, device=device)
        self._done = torch.zeros(pictures, dtype=torch.bool, device=device)

    def go_on(self, scores: Float[Tensor, "B R V"], position: int) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Rows of the captions that go on, and their newest words."""
        vocabulary = scores.shape[2]
        totals = (self._sums[:, :, None] + scores).flatten(1)
        sums, places = totals.topk(min(2 * self._beams, totals.shape[1]), 1)
        parents, words = places // vocabulary, places % vocabulary
        ends = words == self._rules.end
        self._finish(sums, parents, ends, position)
        # Stable: of those that do not end, the best come first, in their order.
        order = ends.long().sort(dim=1, stable=True).indices[:, : self._beams]
        self._sums = sums.gather(1, order).masked_fill(ends.gather(1, order), -torch.inf)
        parents, words = parents.gather(1, order), words.gather(1, order)
        self._words = self._words.gather(1, parents[:, :, None].expand_as(self._words))
        self._words[:, :, position] = words
        self._done |= self._finished >= self._beams
        # Sums only fall, and no caption gets longer than the longest.
        self._done |= self._best >= self._sums.amax(1) / self._rules.max_length**self._penalty
        first = torch.arange(len(parents), device=parents.device)[:, None] * self._beams
        return (first + parents).flatten(), words.flatten()

    def _finish(self, sums: Tensor, parents: Tensor, ends: Tensor, position: int) -> None:
        """Takes note of captions that end among the R best."""
        ended = ends[:, : self._beams] & (sums[:, : self._beams] > -torch.inf) & ~self._done[:, None]
        values = (sums[:, : self._beams] / (position + 1) ** self._penalty).masked_fill(~ended, -torch.inf)
        self._keep(values, self._words.gather(1, parents[:, : self._beams, None].expand_as(self._words)))
        self._finished += ended.sum(1)

    def _keep(self, values: Float[Tensor, "B R"], words: Int[Tensor, "B R L"]) -> None:
        value, which = values.max(1)
        better = value > self._best
        chosen = words.gather(1, which[:, None, None].expand(-1, 1, words.shape[2])).squeeze(1)
        self._best = torch.where(better, value, self._best)
        self._best_words = torch.where(better[:, None], chosen, self._best_words)

    def all_done(self) -> bool:
        """Whether no picture needs another step."""
        return bool(self._done.all())

    def best(self, length: int) -> Int[Tensor, "B T"]:
        """The best caption of each picture; where there was no room for more, unfinished ones count too."""
        unfinished = (self._sums / length**self._penalty).masked_fill(self._done[:, None], -torch.inf)
        self._keep(unfinished, self._words)
        return self._best_words[:, :length]
