"""Rows to WebDataset shards: every picture checked, the folder complete or not there at all.

OUT/                      layout `train`            OUT/                            layout `benchmark`
  000000.tar                                          test/0.tar, test/nshards.txt
  000000.tar.index.jsonl                              classnames.txt, zeroshot_classification_templates.txt
  pack.json, skipped.jsonl                            pack.json, skipped.jsonl

A sample is `KEY.webp` (the picture's own bytes, which tell the extension), `KEY.txt` (its first caption), `KEY.json`
(`{"captions": {column: [text, …]}, "meta": {…}}`) and, with a label, `KEY.cls`. The benchmark layout is the one that
clip-benchmark reads; there `KEY.txt` has all captions of all columns, a line each. `pack.json` counts rows, samples and
what was skipped; `skipped.jsonl` lists the latter. Equal input gives equal bytes, for any number of workers.

Rows are dealt to shards by their number before any is read; so shards do not depend on each other, are written by
several processes, and those that are complete outlast an interruption (see `packing.workfolder`).
"""

import json
import logging
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diptych import log as logs
from diptych.config import to_tree
from diptych.errors import DataError
from diptych.runfolder import write_text
from diptych.seeding import generator
from diptych_data import parallel
from diptych_data.packing import shard
from diptych_data.packing.encode import Shrink
from diptych_data.packing.options import PackOptions
from diptych_data.packing.workfolder import WorkFolder, opened
from diptych_data.readers.family import Columns, Numbers, Source, open_source

__all__ = ["PackOptions", "PackSummary", "pack"]

log = logging.getLogger(__name__)
_ROWS_PER_WORKER = 2000
"""Fewer are sooner packed by one process than a second one is started."""
_FREE = ("out", "workers", "overwrite")
"""Options that change no byte of a shard."""


@dataclass(frozen=True)
class PackSummary:
    """What was written."""

    rows: int
    samples: int
    shards: int
    skipped: int
    skipped_by_reason: dict[str, int] = field(default_factory=dict)
    out: str = ""


@dataclass(frozen=True)
class _Place:
    """Where a shard goes, and which rows are in it."""

    tar: Path
    outcome: Path
    numbers: Numbers


def pack(options: PackOptions) -> PackSummary:
    """Writes the shards of a source. Interrupted, the same call goes on with the shards that are not complete.

    Raises:
        DataError: the source cannot be used, a row is bad and `on_bad` is `stop`, or `out` is not empty: nothing is
            left behind. Or the disk is full, or a process was killed: complete shards are kept for the next try.
    """
    out = options.out.resolve()
    WorkFolder(out).restore()
    _require_free(out, options)
    source = open_source(options.source, options.form, _columns(options))
    if options.key is not None:
        _require_unique(source, options)
    with opened(out, _digest(options, source)) as folder:
        return _pack_into(folder, options, source)


def _require_free(out: Path, options: PackOptions) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"output folder is a file · {out} · choose another")
    if out.is_dir() and any(out.iterdir()) and not options.overwrite:
        raise DataError(f"output folder is not empty · {out} · choose another, or add --overwrite")
    inputs = (options.source, options.image_root, options.captions_file, options.classes, options.templates)
    for path in inputs:
        if path is not None and path.resolve().is_relative_to(out):
            raise DataError(f"output folder holds the input ({path}) · {out} · choose another")


def _columns(options: PackOptions) -> Columns:
    return Columns(
        image=options.image,
        captions=options.captions,
        label=options.label,
        key=options.key,
        separator=options.separator,
        captions_file=options.captions_file,
        image_root=options.image_root,
    )


def _require_unique(source: Source, options: PackOptions) -> None:
    """Raises DataError for a key that is there twice.

    Keys are compared by 64-bit checksums, which hold a million rows in few bytes and of different keys are not equal.
    """
    rows, sums = array("q"), array("q")
    with logs.progress("checking keys", source.num_rows) as bar:
        for number, key in enumerate(source.keys()):
            bar.advance()
            if key is not None:  # a row without one is bad, and found when it is packed
                rows.append(number)
                digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                sums.append(int.from_bytes(digest, "little", signed=True))
    order = np.argsort(sums, kind="stable")
    (again,) = np.nonzero(np.diff(np.array(sums)[order]) == 0)
    if len(again):
        first, second = (source.where(rows[order[place]]) for place in (again[0], again[0] + 1))
        advice = "use a column without repetitions"
        raise DataError(f"key is there twice ({first}; {second}) · column {options.key} · {advice}")


def _digest(options: PackOptions, source: Source) -> str:
    """Equal where the same shards would be written."""
    parts = [_settings(options), str(options.source.resolve()), source.identity, source.num_rows]
    parts += [_content(path) for path in (options.classes, options.templates)]
    return blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def _settings(options: PackOptions) -> dict[str, Any]:
    return {name: value for name, value in to_tree(options).items() if name not in _FREE}


def _content(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_bytes().hex()
    except OSError as error:
        raise DataError(f"file cannot be read ({error.strerror}) · {path} · check the path") from error


def _pack_into(folder: WorkFolder, options: PackOptions, source: Source) -> PackSummary:
    try:
        source.prepare(folder.work, "source" if options.shuffle_seed is None else "shuffled")
        places = list(_places(folder, options, source.num_rows))
        _write_shards(places, options, source)
        summary = _summarise(folder, places, options)
        if options.layout == "benchmark":
            _write_benchmark_files(options, folder.shards, len(places))
    except parallel.Killed:
        raise
    except DataError:
        folder.discard()
        raise
    folder.finish()
    if summary.skipped:
        log.warning(
            "%d of %d rows skipped (%s): see %s",
            summary.skipped,
            summary.rows,
            ", ".join(f"{count} {reason}" for reason, count in summary.skipped_by_reason.items()),
            options.out / "skipped.jsonl",
        )
    return summary


def _places(folder: WorkFolder, options: PackOptions, num_rows: int) -> Iterator[_Place]:
    order = np.arange(num_rows)
    if options.shuffle_seed is not None:
        order = generator(options.shuffle_seed, "pack").permutation(num_rows)
    benchmark = options.layout == "benchmark"
    shards = folder.shards / "test" if benchmark else folder.shards
    shards.mkdir(exist_ok=True)
    for number, start in enumerate(range(0, num_rows, options.samples_per_shard)):
        tar = shards / (f"{number}.tar" if benchmark else f"{number:06d}.tar")
        yield _Place(tar, folder.outcomes / f"{tar.stem}.json", order[start : start + options.samples_per_shard])


def _write_shards(places: Sequence[_Place], options: PackOptions, source: Source) -> None:
    shrink = Shrink(options.max_side, options.quality) if options.max_side is not None else None
    missing = [place for place in places if shard.finished(place.tar, place.outcome) is None]
    rows = sum(len(place.numbers) for place in missing)
    if len(missing) < len(places):
        log.info("goes on: %d of %d shards are complete", len(places) - len(missing), len(places))
    txt: Literal["first", "all"] = "all" if options.layout == "benchmark" else "first"
    tasks = (
        shard.Task(place.tar, place.outcome, place.numbers, source.part(place.numbers), options.on_bad, shrink, txt)
        for place in missing
    )
    number = options.workers or min(parallel.cores(), max(1, rows // _ROWS_PER_WORKER))
    with logs.progress(f"packing {options.out.name}", source.num_rows, done=source.num_rows - rows) as bar:
        for outcome in parallel.run(shard.write, tasks, workers=min(number, len(missing))):
            bar.advance(outcome.rows)


def _summarise(folder: WorkFolder, places: Sequence[_Place], options: PackOptions) -> PackSummary:
    """Adds up the shards' outcomes; writes pack.json and, where rows were skipped, skipped.jsonl."""
    rows = samples = 0
    reasons: Counter[str] = Counter()
    listing = folder.shards / "skipped.jsonl"
    with listing.open("w", encoding="utf-8") as file:
        for place in places:
            outcome = shard.read_outcome(place.outcome)
            rows, samples = rows + outcome.rows, samples + outcome.samples
            for skipped in outcome.skipped:
                reasons[skipped.reason] += 1
                file.write(json.dumps(vars(skipped), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if not reasons:
        listing.unlink()
    if not samples:
        found = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise DataError(f"not one readable picture ({found}) · {options.source} · check the pictures")
    summary = PackSummary(rows, samples, len(places), reasons.total(), dict(sorted(reasons.items())), str(options.out))
    report = {"format": 1} | {name: value for name, value in vars(summary).items() if name != "out"}
    text = json.dumps(report | {"options": _settings(options)}, ensure_ascii=False, indent=1)
    write_text(folder.shards / "pack.json", text + "\n")
    return summary


def _write_benchmark_files(options: PackOptions, out: Path, shards: int) -> None:
    (out / "test" / "nshards.txt").write_text(f"{shards}\n", encoding="utf-8")
    if options.classes is None:
        (out / "dataset_type.txt").write_text("retrieval\n", encoding="utf-8")
        return
    shutil.copyfile(options.classes, out / "classnames.txt")
    templates = out / "zeroshot_classification_templates.txt"
    if options.templates is not None:
        shutil.copyfile(options.templates, templates)
    else:
        templates.write_text("{c}\n", encoding="utf-8")
