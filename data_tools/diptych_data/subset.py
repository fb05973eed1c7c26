"""Some of a set's samples, or several sets in one: new shards, the members as they were."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from diptych.config import Config, to_tree
from diptych.data.shards import list_shards
from diptych.errors import DataError
from diptych.runfolder import write_text
from diptych_data import entries
from diptych_data.entries import Entry, Part
from diptych_data.rewrite import Written, new_folder, require_free, write_sets, write_shards


@dataclass(frozen=True)
class SubsetOptions(Config):
    """Which samples are taken. `shard_range` goes first; then one of `count`, `fraction`, `keys`, or none of them."""

    shards: str
    """Folder, glob or brace pattern."""
    out: Path
    """Folder for the new shards."""
    shard_range: str | None = None
    """Shards `FROM:TO` in their sorted order, from 0, TO not included; either may be left out."""
    count: int | None = None
    """Samples to take; all where there are fewer."""
    fraction: float | None = None
    """Share of the samples to take, in (0, 1]."""
    keys: Path | None = None
    """Text file with one key per line; samples come in the shards' order."""
    pick: Literal["random", "first"] = "random"
    """For `count` and `fraction`: drawn at random, or from the front. In both the order stays."""
    seed: int = 0
    """Of the draw."""
    samples_per_shard: int = 1000
    """Samples in a new shard (the last has fewer)."""
    overwrite: bool = False
    """Replace a folder of shards that is already there."""

    def __post_init__(self) -> None:
        given = [name for name in ("count", "fraction", "keys") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give only one of {' and '.join(given)}")
        if not given and self.shard_range is None:
            raise ValueError("say what to take: count, fraction, keys or shard_range")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, not {self.count}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], not {self.fraction}")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {self.samples_per_shard}")


@dataclass(frozen=True)
class MergeOptions(Config):
    """Which sets become one."""

    sources: tuple[str, ...]
    """Folders, globs or brace patterns, in the order in which they follow one another."""
    out: Path
    """Folder for the new shards."""
    samples_per_shard: int = 1000
    """Samples in a new shard (the last has fewer)."""
    overwrite: bool = False
    """Replace a folder of shards that is already there."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources must name at least one set")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {self.samples_per_shard}")


@dataclass(frozen=True)
class SubsetSummary:
    """What was written; also in `subset.json` or `merge.json`."""

    samples: int
    shards: int
    renamed: int
    """Samples that got a number in front of their key because another has it."""
    skipped: dict[str, int]
    """Reason → samples that could not be read."""
    missing_keys: int
    """Keys of the list that no sample has."""
    out: str


def subset(options: SubsetOptions) -> SubsetSummary:
    """Writes the chosen samples; keys that occur twice are made unique.

    Raises:
        DataError: nothing is chosen, or `out` cannot be used. What was there stays.
    """
    shards = _range(list_shards(options.shards), options.shard_range)
    require_free(options.out, shards, overwrite=options.overwrite)
    missing = 0
    if options.keys is not None:
        wanted = _read_keys(options.keys)
        found = _by_key(shards, wanted)
        missing = len(wanted.difference(*(named.keys for named in found)))
        chosen = [named.part for named in found]
    else:
        counts = entries.count(shards)
        chosen = entries.locate(shards, counts, _positions(options, sum(counts)))
    with new_folder(options.out) as folder:
        written = write_shards(
            chain.from_iterable(map(entries.read, chosen)),
            folder,
            samples_per_shard=options.samples_per_shard,
            total=sum(map(len, chosen)),
        )
        summary = _summary(written, options.out, missing)
        _note(folder / "subset.json", options, summary)
    return summary


def merge(options: MergeOptions) -> SubsetSummary:
    """Writes all samples of several sets behind one another; a key that is taken gets its set's number in front.

    Raises:
        DataError: a set has no shards, or `out` cannot be used. What was there stays.
    """
    sets = [list_shards(source) for source in options.sources]
    shards = [shard for one in sets for shard in one]
    require_free(options.out, shards, overwrite=options.overwrite)
    total = sum(entries.count(shards))
    with new_folder(options.out) as folder:
        written = write_sets(
            [_all(one) for one in sets], folder, samples_per_shard=options.samples_per_shard, total=total
        )
        summary = _summary(written, options.out, 0)
        _note(folder / "merge.json", options, summary)
    return summary


def _all(shards: Iterable[str]) -> Iterator[Entry]:
    return chain.from_iterable(map(entries.read, entries.whole(shards)))


def _summary(written: Written, out: Path, missing: int) -> SubsetSummary:
    return SubsetSummary(written.samples, written.shards, written.renamed, written.skipped, missing, str(out))


def _note(path: Path, options: Config, summary: SubsetSummary) -> None:
    document = {"options": to_tree(options), "summary": asdict(summary)}
    write_text(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def _range(shards: Sequence[str], text: str | None) -> Sequence[str]:
    if text is None:
        return shards
    first, colon, last = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (first, last)):
        raise DataError(f"shard_range {text!r} is not of the form FROM:TO · write it as 0:10, 10: or :10")
    chosen = shards[int(first or 0) : int(last) if last else None]
    if not chosen:
        raise DataError(f"shard_range {text!r} holds none of the {len(shards)} shards · {shards[0]} · choose another")
    return chosen


def _positions(options: SubsetOptions, total: int) -> np.ndarray:
    if options.count is None and options.fraction is None:
        return np.arange(total)
    number = options.count if options.count is not None else max(1, round((options.fraction or 0) * total))
    number = min(number, total)
    if options.pick == "first":
        return np.arange(number)
    return np.sort(np.random.default_rng(options.seed).choice(total, number, replace=False, shuffle=False))


@dataclass(frozen=True)
class _Named:
    part: Part
    keys: tuple[str, ...]


def _read_keys(path: Path) -> frozenset[str]:
    try:
        keys = frozenset(line for line in path.read_text(encoding="utf-8").splitlines() if line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list of keys not readable ({error}) · {path} · one key per line, UTF-8") from error
    if not keys:
        raise DataError(f"list of keys is empty · {path} · one key per line")
    return keys


def _by_key(shards: Sequence[str], wanted: frozenset[str]) -> list[_Named]:
    found = []
    for shard in shards:
        names = entries.keys(shard)
        places = tuple(number for number, key in enumerate(names) if key in wanted)
        if places:
            found.append(_Named(Part(shard, places), tuple(names[number] for number in places)))
    if not found:
        raise DataError(f"no sample has one of the {len(wanted)} keys · {shards[0]} … · compare them with `data view`")
    return found
