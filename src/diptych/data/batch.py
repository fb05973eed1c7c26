"""What the loop receives: pictures, tokens, and where the lanes stand after them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Self

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from diptych.data.faults import Fault
from diptych.data.order import LaneCursor
from diptych.data.tokens import trim


@dataclass(frozen=True)
class Cursors:
    """The position of a stream: slots consumed in all, samples of each source, and each lane's place."""

    slot: int = 0
    """Samples consumed over all lanes and ranks since the beginning."""
    drawn: Mapping[str, int] = field(default_factory=dict)
    """Source → how many of them came from it."""
    lanes: Mapping[tuple[str, int], LaneCursor] = field(default_factory=dict)
    """(source, lane) → its place."""
    shards: Mapping[str, str] = field(default_factory=dict)
    """Source → digest of its list of shards: the order is that of this list and of no other."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; a checkpoint holds those of all ranks' cursors merged."""
        sources: dict[str, Any] = {
            name: {"drawn": drawn, "shards": self.shards[name], "lanes": {}} for name, drawn in self.drawn.items()
        }
        for (name, lane), cursor in sorted(self.lanes.items()):
            sources[name]["lanes"][str(lane)] = [cursor.epoch, cursor.position]
        return {"slot": self.slot, "sources": sources}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The reverse of `to_json`."""
        sources = tree["sources"]
        lanes = {
            (name, int(lane)): LaneCursor(*place)
            for name, source in sources.items()
            for lane, place in source["lanes"].items()
        }
        drawn = {name: source["drawn"] for name, source in sources.items()}
        return cls(tree["slot"], drawn, lanes, {name: source["shards"] for name, source in sources.items()})

    @classmethod
    def merge(cls, parts: Sequence["Cursors"]) -> "Cursors":
        """The cursors of readers that own different lanes, after the same batch; at least one."""
        lanes = {lane: cursor for part in parts for lane, cursor in part.lanes.items()}
        return Cursors(parts[0].slot, parts[0].drawn, lanes, parts[0].shards)


@dataclass(frozen=True)
class CounterRows:
    """Pictures of wrong captions, one for each sample of a batch."""

    images: UInt8[Tensor, "n 3 height width"]
    tokens: Int[Tensor, "n context"]
    """Of the captions that they show."""
    present: Bool[Tensor, " n"]
    """Whether the sample has one; where not, its own picture and caption stand there."""
    caption_ids: Int[Tensor, " n"]
    """Of the captions that they show, as those of the samples."""


@dataclass(frozen=True)
class Rows:
    """Samples side by side."""

    images: UInt8[Tensor, "n 3 height width"]
    tokens: Int[Tensor, "n context"]
    caption_ids: Int[Tensor, " n"]
    """Equal for equal captions, on every rank."""
    sample_ids: Int[Tensor, " n"]
    """Equal for the same sample of the same shard, on every rank and in every epoch."""
    hard_tokens: Int[Tensor, "n K context"]
    hard_ids: Int[Tensor, "n K"]
    positive_tokens: Int[Tensor, "n P context"]
    second_tokens: Int[Tensor, "n context"] | None
    teacher_tokens: Int[Tensor, "n context"] | None
    labels: Int[Tensor, " n"] | None = None
    counters: CounterRows | None = None


@dataclass(frozen=True)
class Chunk:
    """One worker's part of a batch."""

    slots: tuple[int, ...]
    keys: tuple[str, ...]
    rows: Rows
    cursors: Cursors
    faults: tuple[Fault, ...]
    """Unusable samples passed over."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    images: UInt8[Tensor, "B 3 height width"]
    tokens: Int[Tensor, "B L"]
    """Trimmed to the longest caption."""
    keys: tuple[str, ...]
    caption_ids: Int[Tensor, " B"]
    """Equal for equal captions, on every rank."""
    sample_ids: Int[Tensor, " B"]
    """Equal for the same sample of the same shard, on every rank and in every epoch."""
    hard_tokens: Int[Tensor, "B K L"]
    """Those of K hard captions each (K may be 0), as long as `tokens`."""
    hard_ids: Int[Tensor, "B K"]
    """Equal to `caption_ids` of equal captions."""
    positive_tokens: Int[Tensor, "B P L"]
    """Those of P further right captions each (P may be 0), as long as `tokens`."""
    second_tokens: Int[Tensor, "B L2"] | None
    """Of a second caption of each picture, where `data.captions.second_views` asks for one."""
    teacher_tokens: Int[Tensor, "B L3"] | None
    """The same captions in the ids of a teacher's tokenizer, whole in all stages, where the run has a teacher."""
    cursors: Cursors
    """After this batch, for this rank's lanes."""
    faults: tuple[Fault, ...]
    """Unusable samples passed over since the last batch."""
    labels: Int[Tensor, " B"] | None = None
    """The classes of the pictures, where `data.labels` asks for them."""
    counters: CounterRows | None = None
    """Where `data.counter_images` asks for them; as long as `tokens`."""


def merge(chunks: Sequence[Chunk], *, text_multiple: int = 1, pinned: bool = False) -> Batch:
    """A batch from its workers' chunks, rows in slot order.

    Args:
        text_multiple: what the length of texts is rounded up to a multiple of.
        pinned: into page-locked memory, from which a GPU copies while the CPU goes on.
    """
    slots = sorted(slot for chunk in chunks for slot in chunk.slots)
    place = {slot: number for number, slot in enumerate(slots)}
    places = [torch.tensor([place[slot] for slot in chunk.slots], dtype=torch.long) for chunk in chunks]
    keys = {place[slot]: key for chunk in chunks for slot, key in zip(chunk.slots, chunk.keys, strict=True)}

    def rows(name: str) -> Tensor:
        parts = [attrgetter(name)(chunk.rows) for chunk in chunks]
        return _in_order(parts, places, pinned=pinned) if len(parts) > 1 or pinned else parts[0]

    def trimmed(name: str) -> Tensor | None:
        return trim(rows(name), text_multiple) if getattr(chunks[0].rows, name) is not None else None

    # One length for right, hard and further captions, so that they can be embedded together.
    has_counters = chunks[0].rows.counters is not None
    kinds = [rows("tokens"), *(rows(f"{kind}_tokens") for kind in ("hard", "positive"))]
    kinds += [rows("counters.tokens")] if has_counters else []
    together = trim(torch.cat([kind.flatten(0, -2) for kind in kinds]), text_multiple)
    parts = together.split([kind.flatten(0, -2).shape[0] for kind in kinds])
    tokens, hard_tokens, positive_tokens, *counter_tokens = (
        part.view(*kind.shape[:-1], together.shape[1]) for part, kind in zip(parts, kinds, strict=True)
    )
    return Batch(
        images=rows("images"),
        tokens=tokens,
        keys=tuple(keys[number] for number in range(len(keys))),
        caption_ids=rows("caption_ids"),
        sample_ids=rows("sample_ids"),
        hard_tokens=hard_tokens,
        hard_ids=rows("hard_ids"),
        positive_tokens=positive_tokens,
        second_tokens=trimmed("second_tokens"),
        teacher_tokens=trimmed("teacher_tokens"),
        cursors=Cursors.merge([chunk.cursors for chunk in chunks]),
        faults=tuple(fault for chunk in chunks for fault in chunk.faults),
        labels=rows("labels") if chunks[0].rows.labels is not None else None,
        counters=CounterRows(
            rows("counters.images"), counter_tokens[0], rows("counters.present"), rows("counters.caption_ids")
        )
        if has_counters
        else None,
    )


def _in_order(parts: Sequence[Tensor], places: Sequence[Tensor], *, pinned: bool) -> Tensor:
    """Rows to their places, in one copy; pictures keep their order in memory."""
    images = parts[0].ndim == 4 and parts[0].is_contiguous(memory_format=torch.channels_last)
    whole = torch.empty(
        (sum(len(part) for part in parts), *parts[0].shape[1:]),
        dtype=parts[0].dtype,
        memory_format=torch.channels_last if images else torch.contiguous_format,
        pin_memory=pinned,
    )
    for part, at in zip(parts, places, strict=True):
        whole[at] = part
    return whole
