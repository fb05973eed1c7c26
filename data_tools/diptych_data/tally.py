"""Counts of one shard that add up over shards: what `stats` gathers, in memory that does not grow with the pictures."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Self

import numpy as np

from diptych.data.faults import UnusableSample
from diptych.data.tokens import Tokenizer
from diptych_data import pictures, scripts
from diptych_data.entries import Entry, Part, read

MakeTokenizer = Callable[[], Tokenizer]
_MAX_COLUMNS = 100
"""Columns that are told apart; a file that names more is broken or hostile."""
OTHER_COLUMNS = "(further columns)"


@dataclass
class ColumnTally:
    """The captions of one column."""

    samples: int = 0
    chars: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    """Between white space: of little meaning for Chinese, Japanese and Thai."""
    tokens: Counter[int] = field(default_factory=Counter)
    letters: Counter[str] = field(default_factory=Counter)
    """Script → letters."""
    main_scripts: Counter[str] = field(default_factory=Counter)
    """Script → captions of which it is the main one."""
    hashes: list[int] = field(default_factory=list)

    def add(self, text: str, count_tokens: Callable[[str], int] | None) -> None:
        """Counts one caption."""
        found = scripts.letters(text)
        self.chars[len(text)] += 1
        self.words[len(text.split())] += 1
        self.letters.update(found)
        self.main_scripts[scripts.main_script(found)] += 1
        self.hashes.append(hash_bytes(text.encode()))
        if count_tokens is not None:
            self.tokens[count_tokens(text)] += 1


@dataclass
class Tally:
    """Everything that `stats` counts."""

    samples: int = 0
    sample_bytes: int = 0
    member_counts: Counter[str] = field(default_factory=Counter)
    member_bytes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    widths: Counter[float] = field(default_factory=Counter)
    heights: Counter[float] = field(default_factory=Counter)
    aspects: Counter[float] = field(default_factory=Counter)
    """Width over height, two decimals."""
    megapixels: Counter[float] = field(default_factory=Counter)
    """Three digits."""
    captions: Counter[int] = field(default_factory=Counter)
    """Captions per sample, over all columns."""
    columns: dict[str, ColumnTally] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    picture_hashes: list[int] = field(default_factory=list)

    def add(self, entry: Entry, count_tokens: Callable[[str], int] | None) -> None:
        """Counts one entry; one that training could not use is counted under its reason too."""
        if entry.fault:
            self.faults[entry.fault] += 1
            return
        self.samples += 1
        for extension, data in entry.members.items():
            self.member_counts[extension] += 1
            self.member_bytes[extension] += len(data)
            self.sample_bytes += len(data)
        try:
            self._add_picture(pictures.picture_bytes(entry.members))
        except UnusableSample as fault:
            self.faults[fault.reason] += 1
        try:
            self._add_texts(pictures.texts(entry.members), count_tokens)
        except UnusableSample as fault:
            self.faults[fault.reason] += 1

    def _add_picture(self, data: bytes) -> None:
        self.picture_hashes.append(hash_bytes(data))
        header = pictures.header(data)
        self.formats[header.format] += 1
        self.modes[header.mode] += 1
        self.widths[header.width] += 1
        self.heights[header.height] += 1
        self.aspects[round(header.width / max(header.height, 1), 2)] += 1
        self.megapixels[float(f"{header.pixels / 1e6:.3g}")] += 1

    def _add_texts(self, texts: Mapping[str, list[str]], count_tokens: Callable[[str], int] | None) -> None:
        self.captions[sum(map(len, texts.values()))] += 1
        for name, found in texts.items():
            known = name in self.columns or len(self.columns) < _MAX_COLUMNS
            column = self.columns.setdefault(name if known else OTHER_COLUMNS, ColumnTally())
            column.samples += 1
            for text in found:
                column.add(text, count_tokens)
        if not texts:
            raise UnusableSample("no_caption")

    def merge(self, other: Self) -> None:
        """Adds another part's counts, hashes apart: those stay with their parts."""
        _merge_counts(self, other)
        for name, column in other.columns.items():
            known = name in self.columns or len(self.columns) < _MAX_COLUMNS
            _merge_counts(self.columns.setdefault(name if known else OTHER_COLUMNS, ColumnTally()), column)


def _merge_counts(into: Tally | ColumnTally, other: Tally | ColumnTally) -> None:
    for name, value in vars(other).items():
        if isinstance(value, Counter):
            getattr(into, name).update(value)
        elif isinstance(value, int):
            setattr(into, name, getattr(into, name) + value)


def hash_bytes(data: bytes) -> int:
    """64 bits that stand for the content."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class PartTally:
    """The counts of a part, its hashes packed: they are what memory holds of every sample."""

    part: Part
    tally: Tally
    pictures: np.ndarray
    captions: dict[str, np.ndarray]


def tally_part(part: Part, *, make_tokenizer: MakeTokenizer | None) -> PartTally:
    """Reads and counts a part."""
    tally = Tally()
    count_tokens = _counter(make_tokenizer) if make_tokenizer is not None else None
    for entry in read(part):
        tally.add(entry, count_tokens)
    seen = np.array(tally.picture_hashes, np.uint64)
    captions = {name: np.array(column.hashes, np.uint64) for name, column in tally.columns.items()}
    tally.picture_hashes.clear()
    for column in tally.columns.values():
        column.hashes.clear()
    return PartTally(part, tally, seen, captions)


@lru_cache(maxsize=1)
def _counter(make_tokenizer: MakeTokenizer) -> Callable[[str], int]:
    """Counts the tokens of a text, start and end included; one tokenizer per process."""
    tokenizer = make_tokenizer()
    return lambda text: int((tokenizer([text]) != 0).sum())
