"""What the loop receives: pictures, tokens, and where the lanes stand after them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from diptych.data.order import LaneCursor
from diptych.data.tokens import trim


@dataclass(frozen=True)
class Cursors:
    """The position of a stream: slots consumed in all, and each lane's place."""

    slot: int
    """Samples consumed over all lanes and ranks since the beginning."""
    lanes: Mapping[int, LaneCursor]

    def to_json(self) -> dict[str, Any]:
        """Plain values; a checkpoint holds those of all ranks' cursors merged."""
        lanes = {str(lane): [cursor.epoch, cursor.position] for lane, cursor in sorted(self.lanes.items())}
        return {"slot": self.slot, "lanes": lanes}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The reverse of `to_json`."""
        return cls(tree["slot"], {int(lane): LaneCursor(*place) for lane, place in tree["lanes"].items()})

    @classmethod
    def merge(cls, parts: Sequence["Cursors"]) -> "Cursors":
        """The cursors of readers that own different lanes, after the same batch; at least one."""
        lanes = {lane: cursor for part in parts for lane, cursor in part.lanes.items()}
        return Cursors(parts[0].slot, lanes)


@dataclass(frozen=True)
class Chunk:
    """One worker's part of a batch."""

    slots: tuple[int, ...]
    images: UInt8[Tensor, "n 3 height width"]
    tokens: Int[Tensor, "n context"]
    keys: tuple[str, ...]
    caption_ids: Int[Tensor, " n"]
    hard_tokens: Int[Tensor, "n K context"]
    cursors: Cursors
    bad: tuple[tuple[str, str], ...]
    """(reason, shard) of each unusable sample passed over."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    images: UInt8[Tensor, "B 3 height width"]
    tokens: Int[Tensor, "B L"]
    """Trimmed to the longest caption."""
    keys: tuple[str, ...]
    caption_ids: Int[Tensor, " B"]
    """Equal for equal captions, on every rank."""
    hard_tokens: Int[Tensor, "B K L"]
    """Those of K hard captions each (K may be 0), as long as `tokens`."""
    cursors: Cursors
    """After this batch, for this rank's lanes."""
    bad: Mapping[str, int]
    """Unusable samples passed over since the last batch, by reason."""


def merge(chunks: Sequence[Chunk], bad: Mapping[str, int]) -> Batch:
    """A batch from its workers' chunks, rows in slot order."""
    slots = [slot for chunk in chunks for slot in chunk.slots]
    order = sorted(range(len(slots)), key=slots.__getitem__)
    keys = [key for chunk in chunks for key in chunk.keys]

    def rows(parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        return joined[torch.tensor(order)] if len(parts) > 1 else joined

    # One length for right and hard captions, so that they can be embedded together.
    tokens, hard_tokens = (rows([getattr(chunk, name) for chunk in chunks]) for name in ("tokens", "hard_tokens"))
    together = trim(torch.cat([tokens, hard_tokens.flatten(0, 1)]))
    return Batch(
        images=rows([chunk.images for chunk in chunks]),
        tokens=together[: len(tokens)],
        keys=tuple(keys[i] for i in order),
        caption_ids=rows([chunk.caption_ids for chunk in chunks]),
        hard_tokens=together[len(tokens) :].view(*hard_tokens.shape[:2], together.shape[1]),
        cursors=Cursors.merge([chunk.cursors for chunk in chunks]),
        bad=dict(bad),
    )
