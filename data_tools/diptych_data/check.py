"""Whether shards can be trained on and trusted: every tar, index, member, picture and caption is looked at.

Reasons of the table, beside those of `diptych.data.faults`:

    missing_index, stale_index    `diptych data index` writes it
    duplicate_key                 another sample of the set has the key; the first keeps its good name
    unsafe_name                   absolute, with `..`, or with characters that do not print
    link, device                  a member that is no plain file (folders are passed over)
    pickle                        a member that `pickle` or `torch.load` would execute; nothing here opens it
    caption_too_long              more than `max_caption_chars` characters
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from diptych.config import Config
from diptych.data import index
from diptych.data.faults import UnusableSample
from diptych.data.images import decode
from diptych_data import entries, parallel, pictures
from diptych_data.entries import Entry, Part
from diptych_data.index import local_shards, state_of
from diptych_data.rewrite import is_unsafe
from diptych_data.tally import hash_bytes

_EXAMPLES = 5
_WORST_SHARDS = 3
_PICKLES = re.compile(r"\.(?:pkl|pickle|pyd|pt|pth|joblib|npy\.pkl)$", re.IGNORECASE)


@dataclass(frozen=True)
class CheckOptions(Config):
    """What is checked, and how far."""

    shards: str
    """Folder, glob or brace pattern; local."""
    fast: bool = False
    """Look at the pictures' headers alone instead of decoding them."""
    max_caption_chars: int = 10_000
    """Longer captions are a problem."""
    workers: int | None = None
    """Processes; none: one for each core."""

    def __post_init__(self) -> None:
        if self.max_caption_chars < 1:
            raise ValueError(f"max_caption_chars must be at least 1, not {self.max_caption_chars}")


@dataclass(frozen=True)
class Problem:
    """Everything that goes by one reason."""

    count: int
    worst_shards: tuple[tuple[str, int], ...]
    examples: tuple[str, ...]
    """`shard key`, or `shard` where it is the shard's own; the first few."""


@dataclass(frozen=True)
class CheckSummary:
    """What was found."""

    shards: int
    samples: int
    problems: dict[str, Problem]
    """Reason → problem, the most frequent first."""

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to mend."""
        return not self.problems


def check(options: CheckOptions) -> CheckSummary:
    """Looks at everything; changes nothing.

    Raises:
        DataError: there are no shards.
    """
    shards = local_shards(options.shards)
    found, keys = _Found(), []
    work = partial(_check_shard, fast=options.fast, max_chars=options.max_caption_chars)
    for shard, result in zip(
        shards, parallel.each(work, shards, title="checking", workers=options.workers), strict=True
    ):
        found.merge(result)
        keys.append((shard, np.array(result.keys, np.uint64)))
    _find_duplicates(keys, found)
    return CheckSummary(len(shards), found.samples, found.problems())


@dataclass
class _Found:
    """Problems of one shard or of many."""

    samples: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(reason, shard) → problems."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    """Hashes, in the shard's order; not merged."""

    def add(self, reason: str, shard: str, key: str = "") -> None:
        """Counts one problem."""
        self.counts[reason, shard] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(f"{shard} {key}".strip())

    def merge(self, other: "_Found") -> None:
        """Adds the next shard's."""
        self.samples += other.samples
        self.counts.update(other.counts)
        for reason, places in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *places][:_EXAMPLES]

    def problems(self) -> dict[str, Problem]:
        """By reason, the most frequent first."""
        by_reason: dict[str, Counter[str]] = {}
        for (reason, shard), count in self.counts.items():
            by_reason.setdefault(reason, Counter())[shard] = count
        ordered = sorted(by_reason, key=lambda reason: (-by_reason[reason].total(), reason))
        return {
            reason: Problem(
                by_reason[reason].total(),
                tuple(by_reason[reason].most_common(_WORST_SHARDS)),
                tuple(self.examples[reason]),
            )
            for reason in ordered
        }


def _check_shard(shard: str, *, fast: bool, max_chars: int) -> _Found:
    found = _Found()
    path = Path(shard)
    try:
        contents = index.scan(path)
    except OSError:
        found.add("missing_shard", shard)
        return found
    state, known = state_of(path)
    if known != contents:
        found.add("missing_index" if state == "missing" else "stale_index", shard)
    for reason, name in _bad_members(path):
        found.add(reason, shard, name)
    for entry in entries.read(Part(shard)):
        if entry.fault:
            found.add(entry.fault, shard, entry.key)
            found.samples += bool(entry.key)
        else:
            found.samples += 1
            for reason in _problems(entry, fast=fast, max_chars=max_chars):
                found.add(reason, shard, entry.key)
        if entry.key:
            found.keys.append(hash_bytes(entry.key.encode()))
    return found


def _bad_members(shard: Path) -> Iterator[tuple[str, str]]:
    """(reason, name) of members that have no business in a shard; the reader passes over most of them."""
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.offset_data < end or member.size < 0:
                    return  # goes round in circles; the scan has a name for it
                end = member.offset_data
                name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                if member.issym() or member.islnk():
                    yield "link", name
                elif not member.isfile() and not member.isdir():
                    yield "device", name
                elif is_unsafe(name):
                    yield "unsafe_name", name
                elif _PICKLES.search(name):
                    yield "pickle", name
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps every header
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, OSError):
        return  # the scan has a name for it


def _problems(entry: Entry, *, fast: bool, max_chars: int) -> Iterator[str]:
    try:
        data = pictures.picture_bytes(entry.members)
        pictures.header(data) if fast else decode(data)
    except UnusableSample as fault:
        yield fault.reason
    try:
        texts = [text for found in pictures.texts(entry.members).values() for text in found]
    except UnusableSample as fault:
        yield fault.reason
        return
    if not texts:
        yield "no_caption"
    if any(len(text) > max_chars for text in texts):
        yield "caption_too_long"


def _find_duplicates(shards: list[tuple[str, np.ndarray]], found: _Found) -> None:
    """Adds the samples whose key an earlier one has: eight bytes of memory per sample."""
    everything = np.concatenate([np.empty(0, np.uint64), *(keys for _, keys in shards)])
    again = np.ones(len(everything), bool)
    again[np.unique(everything, return_index=True)[1]] = False
    start = 0
    for shard, keys in shards:
        numbers = np.flatnonzero(again[start : start + len(keys)])
        start += len(keys)
        if len(numbers):
            found.counts["duplicate_key", shard] = len(numbers)
            places = found.examples.setdefault("duplicate_key", [])
            wanted = Part(shard, tuple(numbers[: _EXAMPLES - len(places)].tolist()))
            places += [f"{shard} {entry.key}" for entry in entries.read(wanted)] if wanted.numbers else []
