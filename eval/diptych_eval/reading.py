"""A set's pictures in batches, decoded by threads while the model is busy with the batch before."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor

from diptych.data.faults import Fault, FaultLog, UnusableSample
from diptych.data.images import decode
from diptych_eval.pictures import Entry, Negative, Pictures

View = Callable[[Image, str], Tensor]
"""From a picture and its key to what the model sees."""


@dataclass(frozen=True)
class Item:
    """What is known of a picture beside its pixels."""

    number: int
    """Its place in the set."""
    key: str
    captions: dict[str, tuple[str, ...]]
    """Column → texts."""
    labels: tuple[int, ...]
    meta: dict[str, str]
    negatives: tuple[Negative, ...] = ()

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """The reverse of `asdict`."""
        captions = {column: tuple(texts) for column, texts in row["captions"].items()}
        negatives = tuple(Negative(**one) for one in row.get("negatives", ()))
        return cls(row["number"], row["key"], captions, tuple(row["labels"]), row["meta"], negatives)


@dataclass(frozen=True)
class Batch:
    """Consecutive entries of a set, those that can be used."""

    images: UInt8[Tensor, "B 3 size size"]
    items: tuple[Item, ...]
    faults: FaultLog


def batches(pictures: Pictures, view: View, ranges: Iterable[range], *, threads: int) -> Iterator[Batch]:
    """A batch for each range of entries."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Callable[[], Batch]] = []
        for entries in ranges:
            ahead.append(_begin(pictures, view, entries, pool))
            if len(ahead) > 1:
                yield ahead.pop(0)()
        for finish in ahead:
            yield finish()


def _begin(pictures: Pictures, view: View, entries: range, pool: ThreadPoolExecutor) -> Callable[[], Batch]:
    """Reads the bytes (files are read by one thread alone) and lets the pool decode; gives what waits for it."""
    faults = FaultLog()
    begun: list[tuple[Item, Future[Tensor]]] = []
    for number in entries:
        try:
            entry = pictures.read(number)
        except UnusableSample as fault:
            faults.add(0, [Fault(fault.reason, pictures.where, str(number))])
            continue
        item = Item(number, entry.key, entry.captions, entry.labels, entry.meta, entry.negatives)
        begun.append((item, pool.submit(_seen, entry, view)))

    def finish() -> Batch:
        images: list[Tensor] = []
        items: list[Item] = []
        for item, waiting in begun:
            try:
                images.append(waiting.result())
            except UnusableSample as fault:
                faults.add(0, [Fault(fault.reason, pictures.where, item.key)])
                continue
            items.append(item)
            faults.add(1, [])
        empty = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return Batch(torch.stack(images) if images else empty, tuple(items), faults)

    return finish


def _seen(entry: Entry, view: View) -> Tensor:
    return view(picture_of(entry), entry.key)


def picture_of(entry: Entry) -> Image:
    """Decoded whole, for a reduced decoding would not be the published protocols', and cut to its box. Raises
    UnusableSample."""
    picture = decode(entry.picture)
    return picture if entry.box is None else picture.crop(entry.box)
