"""The plain reader of evaluation sets: every sample once, in order."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import UInt8
from torch import Tensor

from diptych.data import captions as texts
from diptych.data.faults import Fault, FaultLog, UnusableSample
from diptych.data.images import decode, evaluation_view
from diptych.data.prepare import picture_bytes
from diptych.data.shards import RawSample, ShardStore, list_shards

log = logging.getLogger(__name__)
_THUMBNAIL = 64


@dataclass(frozen=True)
class EvalSample:
    """One sample of an evaluation set."""

    key: str
    image: UInt8[Tensor, "3 size size"]
    """What the model sees."""
    thumbnail: UInt8[Tensor, "3 side side"]
    """What people see: 64 pixels, whatever the model's size."""
    captions: dict[str, tuple[str, ...]]
    """Column → texts."""
    label: int | None
    """Class index from the .cls member."""
    meta: dict[str, str]
    """The other columns."""


def read_split(shards: str, image_size: int) -> Iterator[EvalSample]:
    """Every sample once, in order, in the evaluation view; unusable ones are skipped, counted and reported at the end.

    Raises:
        DataError: there are no shards.
    """
    store, faults = ShardStore(), FaultLog()
    for name in list_shards(shards):
        shard = store.open(name)
        for number in range(shard.num_entries):
            try:
                sample = _sample(shard.read(number), image_size)
            except UnusableSample as fault:
                faults.add(0, [Fault(fault.reason, name, shard.key(number))])
                continue
            faults.add(1, [])
            yield sample
    if faults.unusable:
        log.warning("samples left out of evaluation: %s", faults.summary())


def _sample(raw: RawSample, image_size: int) -> EvalSample:
    picture = decode(picture_bytes(raw.members))  # whole: a reduced decoding would not be the published protocols'
    image, thumbnail = evaluation_view(picture, image_size), evaluation_view(picture, _THUMBNAIL)
    return EvalSample(raw.key, image, thumbnail, texts.read(raw.members), _label(raw), _meta(raw))


def _label(raw: RawSample) -> int | None:
    if "cls" not in raw.members:
        return None
    try:
        return int(raw.members["cls"])
    except ValueError as error:
        raise UnusableSample("bad_label", str(error)) from error


def _meta(raw: RawSample) -> dict[str, str]:
    meta = json.loads(raw.members["json"]).get("meta") if "json" in raw.members else None
    return {str(key): str(value) for key, value in meta.items()} if isinstance(meta, dict) else {}
