"""A shard with its negatives: every member byte for byte but the .json, which gets more keys."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from diptych.data import index
from diptych.runfolder import write_text
from diptych_data import entries
from diptych_data.entries import Entry, Part
from diptych_data.negatives import refine
from diptych_data.negatives.candidate import Negative
from diptych_data.negatives.images.family import Counterparts
from diptych_data.negatives.options import NegativesOptions
from diptych_data.negatives.propose import Proposed, read_proposed
from diptych_data.negatives.refine import Refinement
from diptych_data.negatives.select import choose
from diptych_data.rewrite import is_unsafe, write_tar

EXTRA = "neg"
"""Counter-images are the members `neg.EXT`, `neg2.EXT`, …"""


@dataclass(frozen=True)
class Task:
    """A shard to be written; travels to the process that does it."""

    shard: str
    proposed: Path
    refinement: Path | None
    tar: Path
    outcome: Path
    number: int
    """Of the shard."""


@dataclass(frozen=True)
class Outcome:
    """What became of a shard's samples."""

    samples: int
    skipped: dict[str, int]
    """Reason → samples that are not in the new shard."""
    without: int
    """Samples for which there is no negative."""
    kinds: dict[str, int]
    """Rule and type → negatives."""
    positives: dict[str, int]
    """Column → texts added."""
    images: int
    refused: int
    """Candidates that the refinement does not want."""


class _Counts:
    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.positives: Counter[str] = Counter()
        self.samples = self.without = self.images = self.refused = 0

    def outcome(self) -> Outcome:
        """The counts, in sorted order."""
        parts = (dict(sorted(counter.items())) for counter in (self.skipped, self.kinds, self.positives))
        skipped, kinds, positives = parts
        return Outcome(self.samples, skipped, self.without, kinds, positives, self.images, self.refused)


def write(task: Task, options: NegativesOptions, counterparts: Counterparts | None) -> Outcome:
    """Writes a shard, its outcome and, last, its index. Raises OSError: the disk is full, or will not be written to."""
    counts = _Counts()
    part = task.tar.with_name(f".{task.tar.name}.{os.getpid()}.part")
    try:
        write_tar(part, _samples(task, options, counterparts, counts))
        outcome = counts.outcome()
        write_text(task.outcome, json.dumps(asdict(outcome), ensure_ascii=False))
        part.replace(task.tar)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    index.write(task.tar, index.scan(task.tar))
    return outcome


def finished(task: Task) -> bool:
    """Whether a shard is complete."""
    known = task.tar.is_file() and task.outcome.is_file() and index.sidecar(task.tar).is_file()
    return known and index.read(task.tar) is not None


def read_outcome(path: Path) -> Outcome:
    """An outcome as it was written."""
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))


@cache
def _refinement(path: Path, _stamp: int) -> Refinement:
    return refine.load(path)


def _samples(
    task: Task, options: NegativesOptions, counterparts: Counterparts | None, counts: _Counts
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of all that is written."""
    known = {one.number: one for one in read_proposed(task.proposed)}
    learned = _refinement(task.refinement, task.refinement.stat().st_mtime_ns) if task.refinement else Refinement()
    taken: Counter[str] = Counter()
    for entry in entries.read(Part(task.shard)):
        proposed = known.get(entry.number)
        if reason := _unwritable(entry, proposed):
            counts.skipped[reason] += 1
            continue
        assert proposed is not None
        keys = learned.keys(proposed.negatives, seed=options.seed, number=entry.number)
        counts.refused += sum(key is None for key in keys)
        chosen = choose(proposed.negatives, keys, options.per_picture, taken)
        counts.without += not chosen
        if not chosen and options.without == "drop":
            counts.skipped["no_negative"] += 1
            continue
        yield entry.key, _with_negatives(entry, proposed, chosen, options, counterparts, counts)


def _unwritable(entry: Entry, proposed: Proposed | None) -> str:
    if entry.fault:
        return entry.fault
    if any(is_unsafe(f"{entry.key}.{extension}") for extension in entry.members):
        return "unsafe_key"
    return "" if proposed is not None else "bad_caption"


def _with_negatives(
    entry: Entry,
    proposed: Proposed,
    chosen: list[Negative],
    options: NegativesOptions,
    counterparts: Counterparts | None,
    counts: _Counts,
) -> dict[str, bytes]:
    pictures: dict[str, bytes] = {}
    records = [one.document() for one in chosen]
    for place, data, extension in counterparts.find(entry.key, chosen) if counterparts else ():
        member = f"{EXTRA}{len(pictures) + 1 if pictures else ''}.{extension}"
        pictures[member] = data
        if place is not None:
            records[place]["image"] = member
    counts.samples += 1
    counts.images += len(pictures)
    counts.kinds.update(one.kind for one in chosen)
    counts.positives.update({name: len(texts) for name, texts in proposed.positives.items()})
    columns = {options.column: [one.text for one in chosen]} | proposed.positives
    document = extended(json.loads(entry.members.get("json", b"{}")), columns, records)
    old = {name: data for name, data in entry.members.items() if name not in pictures}
    return old | {"json": _dumps(document)} | pictures


def _dumps(document: dict[str, Any]) -> bytes:
    try:
        return json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which was escaped in the old member too
        return json.dumps(document).encode()


def extended(document: dict[str, Any], columns: dict[str, list[str]], records: list[dict[str, Any]]) -> dict[str, Any]:
    """A sample's JSON with more columns and the negatives' records; no key is lost, texts of a column stay in front."""
    document = dict(document)
    nested = document.get("captions", {})
    # Where `captions` is no map, as others write it, a column is a key of its own beside it.
    home = dict(nested) if isinstance(nested, dict) else document
    for name, texts in columns.items():
        old = home.get(name, [])
        before = [old] if isinstance(old, str) else old if isinstance(old, list) else []
        home[name] = [*before, *(text for text in texts if text not in before)]
    if isinstance(nested, dict):
        document["captions"] = home
    known = document.get("negatives", [])
    document["negatives"] = [*(known if isinstance(known, list) else []), *records]
    return document
