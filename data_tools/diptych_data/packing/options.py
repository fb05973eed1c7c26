"""The settings of `diptych data pack`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych.config import Config


@dataclass(frozen=True)
class PackOptions(Config):
    """What is packed, and how."""

    source: Path
    """Folder of pictures, table (.csv, .tsv, .jsonl, .parquet), folder of .jsonl or .parquet parts, or what img2dataset
    downloaded."""
    out: Path
    """Folder for the shards."""
    form: str = "auto"
    """Kind of source: folder, table, jsonl, parquet, img2dataset; `auto`: told by the names of the files."""
    image: str = "image"
    """Table: column of picture paths, relative to the table; in parquet also of their bytes."""
    captions: tuple[str, ...] = ("caption",)
    """Table: columns of captions; the first gives the .txt member, in the benchmark layout all of them do."""
    separator: str | None = None
    """Table: what divides several captions in one cell; none: a cell is one caption."""
    label: str | None = None
    """Table: column of class numbers; gives the .cls member."""
    key: str | None = None
    """Table: column whose value becomes the sample's key (unique; A-Z a-z 0-9 `_` `-`); none: the row's number."""
    image_root: Path | None = None
    """Table: folder that relative picture paths start from; none: the table's own."""
    captions_file: Path | None = None
    """Folder: text file with one caption per picture, in the order of the sorted paths."""
    samples_per_shard: int = 1000
    """Rows in a shard (the last has fewer). At least as many shards as data.lanes are needed to train."""
    shuffle_seed: int | None = None
    """Rows are packed in an order drawn with this seed, so that shards are mixed; none: in the source's order."""
    max_side: int | None = None
    """Pictures with a longer side are shrunk to it and encoded anew, as JPEG, transparent ones as WebP; none: all keep
    their own bytes."""
    quality: int = 90
    """Quality of shrunk pictures, 1 to 100."""
    layout: Literal["train", "benchmark"] = "train"
    """`benchmark` writes a test set that zero-shot classification, retrieval and clip-benchmark read; its .txt members
    have all captions of a picture, a line each."""
    classes: Path | None = None
    """Benchmark: file with one class name per line; line number = label."""
    templates: Path | None = None
    """Benchmark: file with one prompt per line, `{c}` for the class name; none: the bare name."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What a row that cannot be packed does: ends the work, or is left out, counted and listed in skipped.jsonl."""
    workers: int | None = None
    """Processes; none: one for each core, fewer where there is little to do. The shards are the same for any number."""
    overwrite: bool = False
    """Replace a folder that is already there."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {self.samples_per_shard}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")
        if self.max_side is not None and self.max_side < 16:
            raise ValueError(f"max_side must be at least 16 pixels, not {self.max_side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie between 1 and 100, not {self.quality}")
        if not self.captions:
            raise ValueError("captions must name at least one column")
        if self.layout == "benchmark" and self.label is not None and self.classes is None:
            raise ValueError("the benchmark layout with labels needs classes=FILE")
