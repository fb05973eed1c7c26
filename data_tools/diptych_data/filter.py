"""Samples that meet the rules become new shards: size of the picture, length of the caption, a model's judgement.

Rules are tried in the order of the fields below; a sample goes by the first one that it fails. The model sees only what
the rules before it have let through, and `keep_fraction` is a share of those.

OUT/
  000000.tar …
  filter.json      options, how many each rule let go
  scores.csv       every sample of the input: key, shard, what was measured, kept or not, the rule that let it go
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.config import Config, to_tree
from diptych.data.faults import UnusableSample
from diptych.data.shards import list_shards
from diptych.errors import DataError
from diptych.runfolder import write_text
from diptych_data import entries, nearest, parallel, pictures
from diptych_data.encoder import Encoder, LoadModel, embed
from diptych_data.entries import Entry, Part
from diptych_data.rewrite import new_folder, require_free, write_shards


@dataclass(frozen=True)
class CredibilityRule(Config):
    """Caption credibility: do pictures that look alike have captions that say alike, and the reverse? In [0, 1]."""

    k: int = 10
    """Neighbours that are asked, for the picture and for the caption."""
    min: float | None = None
    """Lower ones go."""
    keep_fraction: float | None = None
    """Share with the highest credibility that stays, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}")
        _check_choice(self.min, self.keep_fraction, "min")


def _check_choice(minimum: float | None, fraction: float | None, name: str) -> None:
    if minimum is not None and fraction is not None:
        raise ValueError(f"give either {name} or keep_fraction, not both")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"keep_fraction must lie in (0, 1], not {fraction}")


@dataclass(frozen=True)
class FilterOptions(Config):
    """Which samples stay. A rule without a value is not applied."""

    shards: str
    """Folder, glob or brace pattern."""
    out: Path
    """Folder for the new shards, filter.json and scores.csv."""
    min_side: int | None = None
    """Shorter side of the picture, pixels, at least."""
    max_aspect: float | None = None
    """Longer side over shorter side, at most."""
    max_megapixels: float | None = None
    """Width times height, at most."""
    min_chars: int | None = None
    """Characters of the caption, at least."""
    max_chars: int | None = None
    """Characters of the caption, at most."""
    min_words: int | None = None
    """Words of the caption between white space, at least."""
    max_words: int | None = None
    """Words of the caption between white space, at most."""
    model: str | None = None
    """Any MODEL that `diptych eval` takes; for CLIP score and credibility."""
    min_score: float | None = None
    """CLIP score (cosine of picture and caption), at least."""
    keep_fraction: float | None = None
    """Share with the highest CLIP score that stays, in (0, 1]."""
    credibility: CredibilityRule | None = None
    """Agreement with neighbours, for finding wrong captions; `credibility={}` measures without letting any go."""
    column: str | None = None
    """Column whose first caption counts; none: the .txt member, or the first column."""
    samples_per_shard: int = 1000
    """Samples in a new shard (the last has fewer)."""
    overwrite: bool = False
    """Replace a folder of shards that is already there."""
    workers: int | None = None
    """Processes; none: one for each core."""

    def __post_init__(self) -> None:
        _check_choice(self.min_score, self.keep_fraction, "min_score")
        judged = self.min_score is not None or self.keep_fraction is not None or self.credibility is not None
        if judged and self.model is None:
            raise ValueError("min_score, keep_fraction and credibility need a model=MODEL")
        if self.model is None and not any(getattr(self, name) is not None for name in _CHEAP):
            raise ValueError("no rule is given; for instance min_side=64, max_aspect=3 or min_words=2")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {self.samples_per_shard}")


_CHEAP = ("min_side", "max_aspect", "max_megapixels", "min_chars", "max_chars", "min_words", "max_words")


@dataclass(frozen=True)
class FilterSummary:
    """What was kept; also in filter.json."""

    samples: int
    """Of the input."""
    kept: int
    dropped: dict[str, int]
    """Rule, or reason why the sample cannot be used → samples that went by it."""
    shards: int
    out: str


@dataclass(slots=True)
class Row:
    """One sample of the input, and what becomes of it."""

    key: str
    shard: str
    number: int
    width: int = 0
    height: int = 0
    chars: int = 0
    words: int = 0
    score: float | None = None
    credibility: float | None = None
    dropped_by: str = ""


def filter_shards(options: FilterOptions, *, load: LoadModel | None = None) -> FilterSummary:
    """Measures every sample, writes those that meet all rules.

    Args:
        load: makes the model that `options.model` names.

    Raises:
        DataError: nothing is left, or `out` cannot be used. What was there stays.
    """
    shards = list_shards(options.shards)
    require_free(options.out, shards, overwrite=options.overwrite)
    encoder = load(options.model) if load is not None and options.model is not None else None
    work = partial(_measure, column=options.column)
    measured = parallel.each(work, entries.whole(shards), title="measuring", workers=options.workers)
    rows = [row for part in measured for row in part]
    for row in rows:
        row.dropped_by = row.dropped_by or _failed(row, options)
    if encoder is not None:
        _judge([row for row in rows if not row.dropped_by], options, encoder)
    kept = [row for row in rows if not row.dropped_by]
    if not kept:
        raise DataError(f"no sample meets the rules ({_counts(rows)}) · {options.shards} · choose less strictly")
    with new_folder(options.out) as folder:
        chosen = chain.from_iterable(map(entries.read, _parts(kept)))
        written = write_shards(chosen, folder, samples_per_shard=options.samples_per_shard, total=len(kept))
        dropped = _counts(rows) + Counter(written.skipped)
        summary = FilterSummary(
            len(rows), written.samples, dict(dropped.most_common()), written.shards, str(options.out)
        )
        _write_scores(folder / "scores.csv", rows)
        document = {"options": to_tree(options), "summary": asdict(summary)}
        write_text(folder / "filter.json", json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    return summary


def _counts(rows: Sequence[Row]) -> Counter[str]:
    return Counter(row.dropped_by for row in rows if row.dropped_by)


def _measure(part: Part, *, column: str | None) -> list[Row]:
    return [_measured(entry, column) for entry in entries.read(part)]


def _measured(entry: Entry, column: str | None) -> Row:
    row = Row(entry.key, entry.shard, entry.number, dropped_by=entry.fault)
    if entry.fault:
        return row
    try:
        header = pictures.header(pictures.picture_bytes(entry.members))
        row.width, row.height = header.width, header.height
        text = pictures.first_text(entry.members, column)
        row.chars, row.words = len(text), len(text.split())
    except UnusableSample as fault:
        row.dropped_by = fault.reason
    return row


def _failed(row: Row, options: FilterOptions) -> str:
    """The first rule on size and length that a sample fails; empty: none."""
    short, long = min(row.width, row.height), max(row.width, row.height)
    values = {
        "min_side": short,
        "max_aspect": long / max(short, 1),
        "max_megapixels": row.width * row.height / 1e6,
        "min_chars": row.chars,
        "max_chars": row.chars,
        "min_words": row.words,
        "max_words": row.words,
    }
    for name in _CHEAP:
        limit = getattr(options, name)
        if limit is not None and (values[name] < limit if name.startswith("min") else values[name] > limit):
            return name
    return ""


# --- a model's judgement -------------------------------------------------------------------------------------------


def _judge(rows: list[Row], options: FilterOptions, encoder: Encoder) -> None:
    """Scores the rows and marks those that the model's rules let go."""
    if not rows:
        return
    found = embed(encoder, _parts(rows), text_of=partial(_caption, column=options.column))
    assert found.texts is not None
    for place, reason in found.faults.items():
        rows[place].dropped_by = reason
    usable = [rows[place] for place in found.rows.tolist()]
    scores = (found.images * found.texts).sum(1)
    for row, score in zip(usable, scores.tolist(), strict=True):
        row.score = score
    _drop(usable, scores, "score", options.min_score, options.keep_fraction)
    if options.credibility is not None:
        left = torch.tensor([place for place, row in enumerate(usable) if not row.dropped_by], dtype=torch.long)
        judged = [usable[place] for place in left.tolist()]
        _judge_neighbours(judged, found.images[left], found.texts[left], options.credibility)


def _judge_neighbours(rows: list[Row], images: Tensor, texts: Tensor, rule: CredibilityRule) -> None:
    if len(rows) <= rule.k:
        raise DataError(f"{len(rows)} samples are too few for {rule.k} neighbours each · lower credibility.k")
    values = nearest.credibility(images, texts, rule.k)
    for row, value in zip(rows, values.tolist(), strict=True):
        row.credibility = value
    _drop(rows, values, "credibility", rule.min, rule.keep_fraction)


def _drop(rows: list[Row], values: Float[Tensor, " N"], name: str, minimum: float | None, share: float | None) -> None:
    """Marks the rows below the minimum or outside the best share; among equals the earlier rows stay."""
    if minimum is not None:
        lost = (values < minimum).nonzero().flatten()
    elif share is not None:
        lost = values.argsort(descending=True, stable=True)[math.ceil(share * len(rows)) :]
    else:
        return
    for place in lost.tolist():
        rows[place].dropped_by = name


def _caption(entry: Entry, *, column: str | None) -> str:
    return pictures.first_text(entry.members, column)


def _parts(rows: Sequence[Row]) -> list[Part]:
    """The rows as parts of shards; they are in the shards' order."""
    return [
        Part(shard, tuple(row.number for row in group)) for shard, group in groupby(rows, key=lambda row: row.shard)
    ]


def _write_scores(path: Path, rows: Sequence[Row]) -> None:
    names = ("key", "shard", "width", "height", "chars", "words", "score", "credibility", "kept", "dropped_by")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            judged = ("" if value is None else f"{value:.6f}" for value in (row.score, row.credibility))
            sizes = (row.width, row.height, row.chars, row.words)
            writer.writerow((row.key, row.shard, *sizes, *judged, int(not row.dropped_by), row.dropped_by))
