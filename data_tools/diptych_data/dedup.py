"""Of pictures that show the same, the largest stays.

A sample goes when its picture is close to one that stays: by a perceptual hash, by a model's features, or by either.
Samples are taken by size of picture, the largest first, among equals in the order of the shards; one that is close to
a sample that already stays is dropped for it. So whatever goes is near to one that stays, and not larger than it.
Connected components would not promise that: where A is like B and B like C, they drop C for A, however unlike.

OUT/
  000000.tar …
  dedup.json        options and counts
  duplicates.csv    kept key and shard, dropped key and shard, by what (hash, model), distance (bits, or 1 - cosine)
"""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from itertools import chain
from pathlib import Path

import numpy as np

from diptych.config import Config, to_tree
from diptych.data.faults import UnusableSample
from diptych.data.shards import list_shards
from diptych.errors import DataError
from diptych.runfolder import write_text
from diptych_data import entries, parallel, pictures
from diptych_data.encoder import Encoder, LoadModel, embed
from diptych_data.entries import Part
from diptych_data.greedy import NO_EDGES, Dropped, Edges, Places, choose
from diptych_data.nearest import close_pairs
from diptych_data.perceptual import Print, fingerprint, near_pairs
from diptych_data.rewrite import new_folder, require_free, write_shards

_EXAMPLES = 20


@dataclass(frozen=True)
class DedupOptions(Config):
    """What counts as the same picture."""

    shards: str
    """Folder, glob or brace pattern."""
    out: Path
    """Folder for the new shards, dedup.json and duplicates.csv."""
    radius: int | None = 4
    """Bits of the 64-bit perceptual hash that may differ, 0 to 16; none: no hashing."""
    max_colour: int = 12
    """Largest difference of the pictures' mean red, green or blue (0 to 255) for the hash to count."""
    model: str | None = None
    """Any MODEL that `diptych eval` takes: pictures are also the same where its features say so."""
    min_cosine: float = 0.96
    """Cosine of two pictures' features from which on they are the same."""
    samples_per_shard: int = 1000
    """Samples in a new shard (the last has fewer)."""
    dry_run: bool = False
    """Look and count; write nothing."""
    overwrite: bool = False
    """Replace a folder of shards that is already there."""
    workers: int | None = None
    """Processes; none: one for each core."""

    def __post_init__(self) -> None:
        if self.radius is None and self.model is None:
            raise ValueError("give a radius, a model, or both")
        if self.radius is not None and not 0 <= self.radius <= 16:
            raise ValueError(f"radius must lie in [0, 16], not {self.radius}")
        if not 0 <= self.max_colour <= 255:
            raise ValueError(f"max_colour must lie in [0, 255], not {self.max_colour}")
        if not 0 < self.min_cosine <= 1:
            raise ValueError(f"min_cosine must lie in (0, 1], not {self.min_cosine}")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {self.samples_per_shard}")


@dataclass(frozen=True)
class Duplicate:
    """A sample that goes, and the one that stays for it."""

    kept: str
    kept_shard: str
    dropped: str
    dropped_shard: str
    by: str
    """`hash` or `model`."""
    distance: float
    """Differing bits, or 1 - cosine."""


@dataclass(frozen=True)
class DedupSummary:
    """What was found; also in dedup.json."""

    samples: int
    kept: int
    duplicates: int
    by: dict[str, int]
    """`hash`, `model` → samples that went by it."""
    unusable: dict[str, int]
    """Reason → samples without a readable picture; they are not written."""
    shards: int
    """New shards; 0 after a dry run."""
    out: str
    examples: tuple[Duplicate, ...]
    """The first few."""


def dedup(options: DedupOptions, *, load: LoadModel | None = None) -> DedupSummary:
    """Writes the samples that stay.

    Args:
        load: makes the model that `options.model` names.

    Raises:
        DataError: there are no shards, or `out` cannot be used. What was there stays.
    """
    shards = list_shards(options.shards)
    if not options.dry_run:
        require_free(options.out, shards, overwrite=options.overwrite)
    encoder = load(options.model) if load is not None and options.model is not None else None
    found = list(parallel.each(_look, entries.whole(shards), title="hashing", workers=options.workers))
    seen = _Seen.of(found)
    if not len(seen.hashes):
        raise DataError(f"not one readable picture · {options.shards} · run `diptych data check` on the shards")
    groups, near_groups = _near_by_hash(seen, options)
    places = Places(
        priority=np.argsort(-seen.pixels, kind="stable"),
        groups=groups,
        near_groups=near_groups,
        near_places=_near_by_model(seen, options, encoder) if encoder is not None else NO_EDGES,
        alike=lambda one, other: seen.colour_difference(one, other) <= options.max_colour,
    )
    dropped = choose(places)
    duplicates = [seen.duplicate(one) for one in dropped]
    faults = sum((one.faults for one in found), Counter())
    summary = DedupSummary(
        samples=len(seen.hashes) + faults.total(),
        kept=len(seen.hashes) - len(dropped),
        duplicates=len(dropped),
        by=dict(Counter(one.by for one in dropped)),
        unusable=dict(faults),
        shards=0,
        out=str(options.out),
        examples=tuple(duplicates[:_EXAMPLES]),
    )
    if options.dry_run:
        return summary
    stays = np.ones(len(seen.hashes), bool)
    stays[[one.place for one in dropped]] = False
    return _write(options, seen.parts(stays), duplicates, summary)


def _write(
    options: DedupOptions, parts: Sequence[Part], duplicates: Sequence[Duplicate], summary: DedupSummary
) -> DedupSummary:
    with new_folder(options.out) as folder:
        chosen = chain.from_iterable(map(entries.read, parts))
        written = write_shards(chosen, folder, samples_per_shard=options.samples_per_shard, total=summary.kept)
        summary = replace(summary, shards=written.shards, kept=written.samples)
        with (folder / "duplicates.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([column.name for column in fields(Duplicate)])
            writer.writerows(astuple(one) for one in duplicates)
        document = {"options": to_tree(options), "summary": asdict(summary)}
        write_text(folder / "dedup.json", json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    return summary


# --- what is seen of the pictures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Looked:
    """The readable pictures of one shard, and how many are not."""

    shard: str
    numbers: list[int]
    keys: list[str]
    prints: list[Print]
    faults: Counter[str]


def _look(part: Part) -> _Looked:
    found = _Looked(part.shard, [], [], [], Counter())
    for entry in entries.read(part):
        try:
            if entry.fault:
                raise UnusableSample(entry.fault)
            seen = fingerprint(pictures.picture_bytes(entry.members))
        except UnusableSample as fault:
            found.faults[fault.reason] += 1
            continue
        found.numbers.append(entry.number)
        found.keys.append(entry.key)
        found.prints.append(seen)
    return found


@dataclass(frozen=True)
class _Seen:
    """All readable pictures, a place for each."""

    looked: tuple[_Looked, ...]
    ends: np.ndarray
    """Of each shard, one behind its last place."""
    hashes: np.ndarray
    colours: np.ndarray
    """[N, 3]"""
    pixels: np.ndarray

    @classmethod
    def of(cls, found: Sequence[_Looked]) -> "_Seen":
        """The shards behind one another."""
        prints = [seen for one in found for seen in one.prints]
        return cls(
            tuple(found),
            np.cumsum([len(one.keys) for one in found]),
            np.array([seen.hash for seen in prints], np.uint64),
            np.array([seen.colour for seen in prints], np.int16).reshape(-1, 3),
            np.array([seen.pixels for seen in prints], np.int64),
        )

    def name(self, place: int) -> tuple[str, str]:
        """Key and shard."""
        shard = int(np.searchsorted(self.ends, place, side="right"))
        one = self.looked[shard]
        return one.keys[place - int(self.ends[shard]) + len(one.keys)], one.shard

    def colour_difference(self, one: int, other: int) -> int:
        """The largest over red, green and blue."""
        return int(np.abs(self.colours[one] - self.colours[other]).max())

    def duplicate(self, one: Dropped) -> Duplicate:
        """The report's line."""
        return Duplicate(*self.name(one.kept), *self.name(one.place), one.by, round(one.distance, 6))

    def parts(self, stays: np.ndarray) -> list[Part]:
        """What the places that stay are in their shards."""
        kept = np.split(stays, self.ends[:-1])
        parts = (
            Part(one.shard, tuple(number for number, good in zip(one.numbers, mask.tolist(), strict=True) if good))
            for one, mask in zip(self.looked, kept, strict=True)
        )
        return [part for part in parts if part.numbers]


# --- what is near --------------------------------------------------------------------------------------------------


def _near_by_hash(seen: _Seen, options: DedupOptions) -> tuple[np.ndarray, Edges]:
    """The group of each place (equal hash, colours in one cell of the width allowed), and near pairs of groups."""
    if options.radius is None:
        return np.arange(len(seen.hashes)), NO_EDGES
    cells = seen.colours.astype(np.int64) // (options.max_colour + 1)
    rows = np.column_stack([seen.hashes.view(np.int64), cells])
    distinct, groups = np.unique(rows, axis=0, return_inverse=True)
    hashes, cells = distinct[:, 0].copy().view(np.uint64), distinct[:, 1:]
    found = []
    for pairs in near_pairs(hashes, options.radius):
        beside = np.abs(cells[pairs.first] - cells[pairs.second]).max(1) <= 1
        found.append(np.column_stack([pairs.first, pairs.second, pairs.distance])[beside].astype(np.int64))
    first, second, distance = np.unique(np.concatenate([np.empty((0, 3), np.int64), *found]), axis=0).T
    return groups.reshape(-1), Edges(first, second, distance.astype(np.float64))


def _near_by_model(seen: _Seen, options: DedupOptions, encoder: Encoder) -> Edges:
    """Pairs of places whose features are near."""
    features = embed(encoder, seen.parts(np.ones(len(seen.hashes), bool)), text_of=None)
    places = features.rows.numpy()
    found = [
        (places[first.numpy()], places[second.numpy()], (1.0 - cosine.double().numpy()).clip(min=0.0))
        for first, second, cosine in close_pairs(features.images, options.min_cosine)
    ]
    return Edges(*(np.concatenate([none, *parts]) for none, *parts in zip(NO_EDGES, *found, strict=True)))
