"""A contact sheet: random samples of a set with everything that is said of them, as one HTML file."""

import base64
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from diptych.config import Config
from diptych.data.captions import clean
from diptych.data.faults import UnusableSample
from diptych.data.images import decode
from diptych.data.shards import list_shards
from diptych.errors import DataError
from diptych.runfolder import write_text
from diptych_data import entries, parallel, pictures
from diptych_data.entries import Entry, Part

_MAX_TEXTS = 12
"""Captions of one column that are shown; the rest is counted."""
_MAX_CHARS = 600


@dataclass(frozen=True)
class ViewOptions(Config):
    """What is shown."""

    shards: str
    """Folder, glob or brace pattern."""
    out: Path = Path("sheet.html")
    """HTML file to write."""
    count: int = 100
    """Samples, drawn at random; all where there are fewer."""
    seed: int = 0
    """Of the draw."""
    side: int = 256
    """Longer side of the thumbnails, pixels."""
    workers: int | None = None
    """Processes; none: one for each core."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 10_000:
            raise ValueError(f"count must lie in [1, 10000], not {self.count}")
        if not 16 <= self.side <= 2048:
            raise ValueError(f"side must lie in [16, 2048], not {self.side}")


@dataclass(frozen=True)
class ColumnView:
    """The captions of one column, cleaned and cut."""

    name: str
    texts: tuple[str, ...]
    num_more: int


@dataclass(frozen=True)
class Card:
    """One sample of the sheet."""

    key: str
    shard: str
    picture: str
    """Data URI; empty where there is a fault."""
    size: str
    columns: tuple[ColumnView, ...]
    label: str
    faults: tuple[str, ...]
    """Why training would pass over it."""


@dataclass(frozen=True)
class ViewSummary:
    """What was written."""

    out: str
    samples: int
    unusable: int


def view(options: ViewOptions) -> ViewSummary:
    """Writes the sheet; a file that is there already is replaced.

    Raises:
        DataError: there are no shards, nothing is in them, or the file cannot be written.
    """
    parts = entries.draw(list_shards(options.shards), options.count, seed=options.seed)
    work = partial(_cards, side=options.side)
    rows = parallel.each(work, parts, title="drawing", workers=options.workers)
    cards = [card for row in rows for card in row]
    if not cards:
        raise DataError(f"the shards hold no samples · {options.shards} · check the path")
    from diptych_data.pages.render import render

    context: dict[str, object] = {
        "title": options.shards,
        "subtitle": f"{len(cards):,} samples drawn at random, seed {options.seed}",
        "cards": cards,
    }
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, render("view.html.j2", context))
    except OSError as error:
        raise DataError(f"sheet not written ({error}) · {options.out} · choose another file with --out") from error
    return ViewSummary(str(options.out), len(cards), sum(bool(card.faults) for card in cards))


def _cards(part: Part, *, side: int) -> list[Card]:
    return [_card(entry, side) for entry in entries.read(part)]


def _card(entry: Entry, side: int) -> Card:
    faults = [entry.fault] if entry.fault else []
    picture, size = "", ""
    columns: tuple[ColumnView, ...] = ()
    if not faults:
        try:
            picture, size = _picture(entry, side)
        except UnusableSample as fault:
            faults.append(fault.reason)
        try:
            columns = _columns(entry)
        except UnusableSample as fault:
            faults.append(fault.reason)
    label = clean(entry.members.get("cls", b"").decode("utf-8", "replace"), max_chars=40)
    return Card(clean(entry.key), Path(entry.shard).name, picture, size, columns, label, tuple(faults))


def _picture(entry: Entry, side: int) -> tuple[str, str]:
    """A small WebP as data URI, and what the original is. Transparency stays: the card shows a checkerboard."""
    data = pictures.picture_bytes(entry.members)
    header = pictures.header(data)
    picture = decode(data, at_least=side)
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    kilobytes = f"{len(data) / 1000:,.1f} kB"
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return uri, f"{header.width} × {header.height} · {header.format} {header.mode} · {kilobytes}"


def _columns(entry: Entry) -> tuple[ColumnView, ...]:
    found = pictures.texts(entry.members)
    if not found:
        raise UnusableSample("no_caption")
    return tuple(
        ColumnView(
            clean(name, max_chars=60),
            tuple(_shown(text) for text in texts[:_MAX_TEXTS]),
            max(0, len(texts) - _MAX_TEXTS),
        )
        for name, texts in list(found.items())[:_MAX_TEXTS]
    )


def _shown(text: str) -> str:
    shown = clean(text, max_chars=_MAX_CHARS)
    return f"{shown}… ({len(text):,} characters)" if len(text) > _MAX_CHARS else shown
