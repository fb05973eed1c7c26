"""Rows to WebDataset shards: every picture checked, the folder complete or not there at all.

OUT/                      layout `train`            OUT/                            layout `benchmark`
  000000.tar                                          test/0.tar, test/nshards.txt
  000000.tar.index.json                               classnames.txt, zeroshot_classification_templates.txt

A sample is `KEY.webp` (the picture's own bytes and extension), `KEY.txt` (its first caption), `KEY.json`
(`{"captions": {column: [text, …]}, "meta": {…}}`) and, with a label, `KEY.cls`. The benchmark layout is the one that
clip-benchmark reads. Equal input gives equal bytes.
"""

import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych import log as logs
from diptych.config import Config
from diptych.data import index
from diptych.data.faults import UnusableSample
from diptych.data.images import decode
from diptych.errors import DataError
from diptych_data.readers import folder, table
from diptych_data.readers.family import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackOptions(Config):
    """What is packed, and how."""

    source: Path
    """Folder of pictures, or a .csv/.tsv table."""
    out: Path
    """Folder for the shards."""
    image: str = "image"
    """Table: column of picture paths, relative to the table."""
    captions: tuple[str, ...] = ("caption",)
    """Table: columns of captions; the first gives the .txt member."""
    separator: str | None = None
    """Table: what divides several captions in one cell; none: a cell is one caption."""
    label: str | None = None
    """Table: column of class numbers; gives the .cls member."""
    captions_file: Path | None = None
    """Folder: text file with one caption per picture, in the order of the sorted paths."""
    samples_per_shard: int = 1000
    """Samples in a shard (the last has fewer). At least as many shards as data.lanes are needed to train."""
    layout: Literal["train", "benchmark"] = "train"
    """`benchmark` writes a test set that zero-shot classification and clip-benchmark read."""
    classes: Path | None = None
    """Benchmark: file with one class name per line; line number = label."""
    templates: Path | None = None
    """Benchmark: file with one prompt per line, `{c}` for the class name; none: the bare name."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What an unreadable picture does."""
    overwrite: bool = False
    """Replace a folder that is already there."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {self.samples_per_shard}")
        if self.layout == "benchmark" and self.label is not None and self.classes is None:
            raise ValueError("the benchmark layout with labels needs classes=FILE")


@dataclass(frozen=True)
class PackSummary:
    """What was written."""

    samples: int
    shards: int
    skipped: int
    out: str


def pack(options: PackOptions) -> PackSummary:
    """Writes the shards of a source.

    Raises:
        DataError: the source cannot be used, a picture is unreadable, or `out` is not empty. Nothing is left behind.
    """
    out = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.overwrite:
        raise DataError(f"output folder is not empty · {out} · choose another, or add --overwrite")
    rows = _rows(options)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        summary = _write_all(options, rows, temporary)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        raise DataError(
            f"shards not written ({error}) · {out} · free space or mend permissions, and start again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _rows(options: PackOptions) -> Sequence[Row]:
    if options.source.is_dir():
        return folder.read(options.source, options.captions_file)
    if options.source.suffix.lower() in (".csv", ".tsv", ".tab"):
        columns = table.Columns(options.image, options.captions, options.label, options.separator)
        return table.read(options.source, columns)
    raise DataError(f"neither a folder nor a .csv or .tsv table · {options.source} · check the path")


def _write_all(options: PackOptions, rows: Sequence[Row], out: Path) -> PackSummary:
    benchmark = options.layout == "benchmark"
    shards_folder = out / "test" if benchmark else out
    shards_folder.mkdir(exist_ok=True)
    samples = shards = skipped = 0
    with logs.progress(f"packing {options.out.name}", len(rows)) as bar:
        for start in range(0, len(rows), options.samples_per_shard):
            part = rows[start : start + options.samples_per_shard]
            name = f"{shards}.tar" if benchmark else f"{shards:06d}.tar"
            written = _write_shard(shards_folder / name, part, first=start, on_bad=options.on_bad)
            samples, skipped, shards = samples + written, skipped + len(part) - written, shards + 1
            bar.advance(len(part))
    if not samples:
        raise DataError(f"not one readable picture · {options.source}")
    if benchmark:
        _write_benchmark_files(options, out, shards)
    return PackSummary(samples, shards, skipped, str(options.out))


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


def _write_shard(path: Path, rows: Sequence[Row], *, first: int, on_bad: str) -> int:
    """Writes one shard and its index; returns the number of samples in it."""
    written = 0
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, row in enumerate(rows, start=first):
                data = row.picture.read_bytes()
                try:
                    decode(data)
                except UnusableSample as fault:
                    if on_bad == "stop":
                        raise DataError(
                            f"unreadable picture ({fault}) · {row.picture} · replace it, or pack with on_bad=skip"
                        ) from fault
                    log.warning("unreadable picture left out: %s (%s)", row.picture, fault)
                    continue
                _add_sample(tar, f"{number:08d}", row, data)
                written += 1
        file.flush()
        os.fsync(file.fileno())
    index.write(path, index.scan(path))
    return written


def _add_sample(tar: tarfile.TarFile, key: str, row: Row, data: bytes) -> None:
    first = next(text for texts in row.captions.values() for text in texts)
    document = {"captions": row.captions, "meta": row.meta | {"file": row.picture.name}}
    extension = row.picture.suffix.lower().lstrip(".")
    _add(tar, f"{key}.{extension}", data)
    if row.label is not None:
        _add(tar, f"{key}.cls", str(row.label).encode())
    _add(tar, f"{key}.json", json.dumps(document, ensure_ascii=False).encode())
    _add(tar, f"{key}.txt", first.encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A plain member without owner or time, so that equal input gives equal bytes."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
