"""What is in a set of shards: pictures, captions, repetitions and faults. Pictures are not decoded, only looked at."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from diptych.config import Config
from diptych.data.faults import UnusableSample
from diptych.data.images import picture_extension
from diptych.data.remote import is_remote
from diptych.data.shards import list_shards
from diptych.runfolder import write_text
from diptych_data import entries, parallel, pictures
from diptych_data.counting import Distribution, Repetitions, distribution
from diptych_data.entries import Entry, Part
from diptych_data.tally import OTHER_COLUMNS, MakeTokenizer, PartTally, Tally, tally_part

_EXAMPLES = 10


@dataclass(frozen=True)
class StatsOptions(Config):
    """What is counted."""

    shards: str
    """Folder, glob or brace pattern."""
    out: Path | None = None
    """Folder for stats.json and stats.html; none: neither is written."""
    sample: int | None = None
    """Samples drawn at random; none: all."""
    seed: int = 0
    """Of the draw."""
    workers: int | None = None
    """Processes; none: one for each core."""

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"sample must be at least 1, not {self.sample}")


@dataclass(frozen=True)
class Repeated:
    """Something that occurs more than once."""

    times: int
    example: str
    """Of a picture the key of its first sample, of a caption the text."""
    shard: str
    """Where it occurs first."""
    column: str = ""


@dataclass(frozen=True)
class Column:
    """The captions of one column."""

    samples: int
    """Samples that have any."""
    captions: int
    repeated: int
    """Captions that an earlier sample has already."""
    chars: Distribution
    words: Distribution
    tokens: Distribution | None
    letters_by_script: dict[str, int]
    captions_by_script: dict[str, int]
    """By the script of most of their letters."""


@dataclass(frozen=True)
class Stats:
    """All that `stats` says."""

    shards: int
    samples: int
    total_samples: int
    """Of the whole set, as its indexes count them; `samples` is below that where a sample was drawn."""
    shard_bytes: int
    sample_bytes: int
    members: dict[str, dict[str, int]]
    formats: dict[str, int]
    modes: dict[str, int]
    width: Distribution | None
    height: Distribution | None
    aspect: Distribution | None
    megapixels: Distribution | None
    captions_per_sample: Distribution | None
    columns: dict[str, Column]
    repeated_pictures: int
    """Pictures whose bytes an earlier sample has already."""
    most_repeated_pictures: tuple[Repeated, ...]
    most_repeated_captions: tuple[Repeated, ...]
    unusable: dict[str, int]
    """Reason → samples that training would pass over."""


def stats(options: StatsOptions, *, make_tokenizer: MakeTokenizer | None = None) -> Stats:
    """Counts everything; with `out` writes stats.json and stats.html there.

    Args:
        make_tokenizer: called once in each process, to count tokens; ids of padding are 0.

    Raises:
        DataError: there are no shards.
    """
    shards = list_shards(options.shards)
    counts = entries.count(shards)
    drawn = options.sample is not None and options.sample < sum(counts)
    parts = entries.draw(shards, options.sample or 0, seed=options.seed) if drawn else entries.whole(shards)
    work = partial(tally_part, make_tokenizer=make_tokenizer)
    total, found = Tally(), []
    for part in parallel.each(work, parts, title="reading shards", workers=options.workers):
        total.merge(part.tally)
        found.append(part)
    result = _summary(total, found, shards, sum(counts))
    if options.out is not None:
        from diptych_data.pages.stats import page  # matplotlib takes a second

        options.out.mkdir(parents=True, exist_ok=True)
        write_text(options.out / "stats.json", json.dumps(asdict(result), ensure_ascii=False, indent=1) + "\n")
        write_text(options.out / "stats.html", page(options.shards, result, total))
    return result


def _summary(total: Tally, found: list[PartTally], shards: Sequence[str], total_samples: int) -> Stats:
    pictures_seen = Repetitions([part.pictures for part in found])
    captions_seen = {
        name: Repetitions([part.captions.get(name, np.empty(0, np.uint64)) for part in found]) for name in total.columns
    }
    return Stats(
        shards=len(shards),
        samples=total.samples,
        total_samples=total_samples,
        shard_bytes=sum(Path(shard).stat().st_size for shard in shards if not is_remote(shard)),
        sample_bytes=total.sample_bytes,
        members={
            name: {"count": count, "bytes": total.member_bytes[name]}
            for name, count in total.member_counts.most_common()
        },
        formats=dict(total.formats.most_common()),
        modes=dict(total.modes.most_common()),
        width=distribution(total.widths),
        height=distribution(total.heights),
        aspect=distribution(total.aspects),
        megapixels=distribution(total.megapixels),
        captions_per_sample=distribution(total.captions),
        columns={name: _column(total, name, seen.repeated) for name, seen in captions_seen.items()},
        repeated_pictures=pictures_seen.repeated,
        most_repeated_pictures=tuple(_picture_examples(found, pictures_seen)),
        most_repeated_captions=tuple(_caption_examples(found, captions_seen)),
        unusable=dict(total.faults.most_common()),
    )


def _column(total: Tally, name: str, repeated: int) -> Column:
    column = total.columns[name]
    chars, words = distribution(column.chars), distribution(column.words)
    assert chars is not None
    assert words is not None
    return Column(
        samples=column.samples,
        captions=chars.count,
        repeated=repeated,
        chars=chars,
        words=words,
        tokens=distribution(column.tokens),
        letters_by_script=dict(column.letters.most_common()),
        captions_by_script=dict(column.main_scripts.most_common()),
    )


# --- examples of what is repeated ----------------------------------------------------------------------------------


def _picture_examples(found: Sequence[PartTally], seen: Repetitions) -> Iterator[Repeated]:
    for times, part, place in seen.most(_EXAMPLES):
        entry = _nth(found[part].part, place, _num_pictures)
        yield Repeated(times, entry.key, entry.shard)


def _num_pictures(entry: Entry) -> int:
    return int(picture_extension(entry.members) is not None)


def _caption_examples(found: Sequence[PartTally], seen: dict[str, Repetitions]) -> list[Repeated]:
    places = [(row, name) for name, column in seen.items() if name != OTHER_COLUMNS for row in column.most(_EXAMPLES)]
    places.sort(key=lambda place: -place[0][0])
    rows = []
    for (times, part, place), name in places[:_EXAMPLES]:
        before = 0
        for entry in entries.read(found[part].part):
            texts = _texts(entry, name)
            if before + len(texts) > place:
                rows.append(Repeated(times, texts[place - before][:200], entry.shard, name))
                break
            before += len(texts)
    return rows


def _texts(entry: Entry, column: str) -> list[str]:
    try:
        return pictures.texts(entry.members).get(column, [])
    except UnusableSample:
        return []


def _nth(part: Part, place: int, size: Callable[[Entry], int]) -> Entry:
    """The entry that holds the thing at `place`, where each entry holds `size(entry)` of them."""
    for entry in entries.read(part):
        place -= size(entry)
        if place < 0:
            return entry
    raise AssertionError("the part has changed while it was read")
