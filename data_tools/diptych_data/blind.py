"""How far negatives can be told from captions without looking at the picture.

A benchmark, or a training set, whose negatives a text-only classifier recognises teaches and measures grammar, not
sight (SugarCrepe, arXiv:2306.14610). For each kind of negative a classifier on n-grams of words and letters is trained
to say which of two texts is the caption, always judged on captions that it has not seen.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch

from diptych.config import Config
from diptych.data import captions
from diptych.data.captions import clean
from diptych.data.faults import UnusableSample
from diptych.data.shards import list_shards
from diptych.errors import DataError
from diptych.seeding import derive
from diptych_data import entries, parallel
from diptych_data.entries import Part
from diptych_data.negatives import guesser
from diptych_data.negatives.candidate import Negative
from diptych_data.negatives.guesser import Accuracy
from diptych_data.negatives.ngrams import differences

ALL = "all"


@dataclass(frozen=True)
class BlindOptions(Config):
    """What is tested."""

    shards: str
    """Folder, glob or brace pattern."""
    column: str = "hard"
    """Negatives; what `diptych data negatives` wrote of them in `negatives` says their kinds and captions."""
    of: str = "txt"
    """Column whose first text is the caption of negatives of which nothing is said."""
    max_pairs: int = 20000
    """Pairs of each kind, drawn; all where there are fewer."""
    seed: int = 0
    """Of the draw."""
    workers: int | None = None
    """Processes; none: one for each core."""

    def __post_init__(self) -> None:
        if self.max_pairs < 1:
            raise ValueError(f"max_pairs must be at least 1, not {self.max_pairs}")


@dataclass(frozen=True)
class Blindness:
    """What the classifiers reach."""

    samples: int
    pairs: int
    kinds: dict[str, Accuracy]
    """Rule and type → accuracy; `all`: one classifier for all of them."""


def blind(options: BlindOptions) -> Blindness:
    """Tests the negatives of a set.

    Raises:
        DataError: there are none.
    """
    shards = list_shards(options.shards)
    work = partial(_pairs, column=options.column, of=options.of)
    parts = list(parallel.each(work, entries.whole(shards), title="reading", workers=options.workers))
    pairs = list(chain.from_iterable(found for _, found in parts))
    if not pairs:
        raise DataError(
            f"no negatives in column {options.column!r} · {options.shards} · diptych data negatives writes them"
        )
    kinds = measure(pairs, max_pairs=options.max_pairs, seed=options.seed)
    return Blindness(sum(samples for samples, _ in parts), len(pairs), kinds)


def measure(pairs: Iterable[Negative], *, max_pairs: int, seed: int) -> dict[str, Accuracy]:
    """Accuracy by kind, and of all together."""
    by_kind: dict[str, list[Negative]] = defaultdict(list)
    for one in pairs:
        by_kind[one.kind].append(one)
    everything = list(chain.from_iterable(by_kind.values()))
    groups = {kind: by_kind[kind] for kind in sorted(by_kind)} | {ALL: everything}
    return {kind: _accuracy(_drawn(found, max_pairs, seed)) for kind, found in groups.items()}


def _drawn(pairs: Sequence[Negative], count: int, seed: int) -> list[Negative]:
    if len(pairs) <= count:
        return sorted(pairs)
    return sorted(pairs, key=lambda one: (derive(seed, "blind", one.how, one.text, one.of), one))[:count]


def _accuracy(pairs: Sequence[Negative]) -> Accuracy:
    texts = [one.of for one in pairs]
    rows = differences([(one.of, one.text) for one in pairs])
    fold, other = (guesser.folds(some, salt="blind") for some in (texts, [one.text for one in pairs]))
    present = torch.bincount(fold, minlength=guesser.FOLDS) > 0
    if int(present.sum()) < 2:  # one fold, and nothing to learn from
        return guesser.accuracy(torch.zeros(len(pairs), dtype=torch.float64), texts)
    return guesser.accuracy(guesser.gaps(rows, fold, guesser.fit(rows, fold, other)), texts)


def _pairs(part: Part, *, column: str, of: str) -> tuple[int, list[Negative]]:
    """(samples with negatives, their pairs) of a shard."""
    samples = 0
    found: list[Negative] = []
    for entry in entries.read(part):
        try:
            said = captions.parse(entry.members)
        except UnusableSample:
            continue
        known = {one.text: one for one in _records(said.document)}
        truth = next((text for one in said.texts(of) if (text := clean(one))), None)
        before = len(found)
        for text in dict.fromkeys(said.texts(column)):
            if text in known:
                found.append(known[text])
            elif truth is not None and clean(text):
                found.append(Negative(clean(text), "unknown", "unknown", truth))
        samples += len(found) > before
    return samples, found


def _records(document: Any) -> Iterable[Negative]:
    records = document.get("negatives")
    for record in records if isinstance(records, list) else ():
        if isinstance(record, dict):
            fields = [record.get(name) for name in ("text", "how", "type", "of")]
            if all(isinstance(value, str) for value in fields):
                yield Negative(*map(str, fields))
