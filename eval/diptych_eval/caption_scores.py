"""Written captions against those of people, as COCO's caption evaluation compares them (arXiv:1504.00325).

A caption is its words (`caption_words`); every picture has one that was written and one or more references. METEOR and
SPICE need programs in Java and are left out.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diptych_eval.caption_words import Words

ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0
_BETA = 1.2

References = Sequence[Sequence[Words]]
"""Of each picture: one or more."""
Weighted = dict[Words, float]


def cider(written: Sequence[Words], references: References) -> Float[Tensor, " N"]:
    """CIDEr-D of each picture, in [0, 10]; the figure of a set is their mean.

        10 · mean over n = 1 … 4 and references r of  exp(-(l_c - l_r)² / 2σ²) · Σ_w min(g_c, g_r)·g_r / (|g_c| |g_r|)

    g: counts of n-grams times log(N / max(1, pictures with a reference that has w)); l: lengths in words; σ = 6. It
    depends on the whole set: the more pictures have a word, the less it says, and of a single picture all is 0.

    Source: arXiv:1411.5726, eqs. 1 and 2, and section 6 for CIDEr-D.
    """
    of_references = [[_ngrams(one) for one in some] for some in references]
    pictures = Counter(gram for some in of_references for gram in set().union(*some))
    scores = []
    for caption, those, counted in zip(written, references, of_references, strict=True):
        ours = _weighted(_ngrams(caption), pictures, len(written))
        likenesses = [
            _likeness(ours, _weighted(grams, pictures, len(written)))
            * math.exp(-((len(caption) - len(one)) ** 2) / (2 * _SIGMA**2))
            for one, grams in zip(those, counted, strict=True)
        ]
        scores.append(10 * sum(likenesses) / len(likenesses))
    return torch.tensor(scores, dtype=torch.float64)


def _ngrams(caption: Words) -> Counter[Words]:
    """Of all orders together: their lengths tell them apart."""
    return Counter(caption[first : first + n] for n in ORDERS for first in range(len(caption) - n + 1))


def _weighted(grams: Counter[Words], pictures: Counter[Words], total: int) -> tuple[Weighted, ...]:
    """By order."""
    found: tuple[Weighted, ...] = tuple({} for _ in ORDERS)
    for gram, count in grams.items():
        found[len(gram) - 1][gram] = count * math.log(total / max(1, pictures[gram]))
    return found


def _likeness(ours: Sequence[Weighted], theirs: Sequence[Weighted]) -> float:
    """Mean over orders of the clipped cosine; 0 for an order in which one side has nothing of weight."""
    total = 0.0
    for left, right in zip(ours, theirs, strict=True):
        norms = math.sqrt(sum(x * x for x in left.values()) * sum(x * x for x in right.values()))
        if norms:
            total += sum(min(value, right[gram]) * right[gram] for gram, value in left.items() if gram in right) / norms
    return total / len(ORDERS)


def bleu_counts(written: Sequence[Words], references: References) -> Int[Tensor, "N 10"]:
    """What BLEU adds up over pictures: for n = 1 … 4 the n-grams that a reference has too (each as often as the
    reference that has it most often), for n = 1 … 4 all n-grams, words, and words of the reference nearest in length
    (of two as near the shorter)."""
    rows = []
    for caption, those in zip(written, references, strict=True):
        grams = _ngrams(caption)
        most: Counter[Words] = Counter()
        for one in those:
            most |= _ngrams(one)
        right = [0] * len(ORDERS)
        for gram, count in (grams & most).items():
            right[len(gram) - 1] += count
        every = [max(0, len(caption) - n + 1) for n in ORDERS]
        nearest = min((abs(len(one) - len(caption)), len(one)) for one in those)[1]
        rows.append([*right, *every, len(caption), nearest])
    return torch.tensor(rows, dtype=torch.long)


def bleu(sums: Float[Tensor, "*S 10"]) -> Float[Tensor, "*S 4"]:
    """BLEU-1 … BLEU-4 of sums of `bleu_counts`, in [0, 1]; 0 where no n-gram is right.

        BLEU-n = min(1, exp(1 - r / c)) · (p_1 · … · p_n)^(1/n)

    p_n: share of right n-grams; c, r: words written, words of references. Source: Papineni et al., ACL 2002.
    """
    counts = sums.double()
    shares = counts[..., :4] / counts[..., 4:8].clamp(min=1)
    brevity = (1 - counts[..., 9] / counts[..., 8].clamp(min=1)).clamp(max=0).exp()
    orders = torch.arange(1, 5, dtype=torch.float64)
    return brevity[..., None] * shares.cumprod(-1) ** (1 / orders)


def rouge_l(written: Sequence[Words], references: References) -> Float[Tensor, " N"]:
    """ROUGE-L of each picture, in [0, 1]: F of precision and recall of the longest common subsequence, each the best
    over references, recall counting β² = 1.44 times. Source: Lin, ACL 2004 workshop."""
    scores = []
    for caption, those in zip(written, references, strict=True):
        common = [_common(caption, one) for one in those]
        precision = max(common) / max(1, len(caption))
        recall = max(found / max(1, len(one)) for found, one in zip(common, those, strict=True))
        weight = recall + _BETA**2 * precision
        scores.append((1 + _BETA**2) * precision * recall / weight if weight else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


def _common(left: Words, right: Words) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(right) + 1)
    for word in left:
        before = 0
        for place, other in enumerate(right, start=1):
            kept = lengths[place]
            lengths[place] = before + 1 if word == other else max(kept, lengths[place - 1])
            before = kept
    return lengths[-1]
