"""Features of earlier batches as candidates."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.distributed.collectives import all_gather_rows
from diptych.distributed.groups import Group, world_group
from diptych.losses.batch import Moment, Pairs, gathered, numbered
from diptych.losses.pairs import OPPOSITE, Modality, Side, Tile
from diptych.losses.plugs.candidates.hard_captions import lengthened
from diptych.losses.plugs.family import Candidates, Layout


@dataclass(frozen=True)
class Queue(Candidates, name="queue"):
    """Anchors of the trained model are compared with the averaged model's features of this batch and of earlier ones.

        C_i = {T̄_j : batch} ∪ {T̄_q : queue} for images, with Ī for texts; T̄, Ī: `teacher_features`, no gradient

    An entry of the anchor's own sample (`sample_ids`) is skipped; the batch enters when its loss has been computed.
    Source: arXiv:2107.07651 (65,536 per modality), after arXiv:1911.05722.
    Cost: a forward pass of the teacher per step, `size` more candidates per anchor, 2·size·D numbers of memory.
    Use: few devices; with the targets `momentum`.
    Verified: dense float64 over several steps and across ranks; size 0 and a teacher equal to the model equal CLIP with
    candidates under stop-gradient.
    """

    needs: ClassVar[tuple[str, ...]] = ("teacher_features", "sample_ids")
    size: int = 65536
    """Entries per modality."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must not be negative, it is {self.size}")

    def build(self, embed_dim: int) -> nn.Module:
        """The queue, empty."""
        return FeatureQueue(self, embed_dim)

    def teacher_width(self, embed_dim: int) -> int | None:
        """The model's own: its anchors are compared with the teacher's features."""
        return embed_dim


def older_self(tile: Tile) -> Bool[Tensor, "R C"]:
    """Entries of a queue that are the anchor's own sample."""
    same = tile.anchor["sample_ids"][:, None] == tile.candidate["sample_ids"][None, :]
    return same & (tile.candidate["in_queue"] > 0)[None, :]


class FeatureQueue(nn.Module, Candidates):
    """See `Queue`. Every rank holds the whole of it, all ranks' batches in the order in which they came."""

    needs = Queue.needs
    image_features: Tensor
    text_features: Tensor
    sample_ids: Tensor

    def __init__(self, config: Queue, embed_dim: int) -> None:
        super().__init__()
        self._size = config.size
        self.register_buffer("image_features", torch.zeros(0, embed_dim))
        self.register_buffer("text_features", torch.zeros(0, embed_dim))
        self.register_buffer("sample_ids", torch.zeros(0, dtype=torch.long))

    def layouts(self, layouts: list[Layout], pairs: Pairs, group: Group, moment: Moment) -> list[Layout]:
        """Two layouts of one direction each: images against the teacher's texts, texts against its images."""
        found = []
        for modality, other in OPPOSITE:
            template = layouts[0].grid
            anchors = numbered(pairs.side(modality, (*template.rows.info, *self.needs)), group)
            candidates = self._candidates(pairs, other, group, anchors)
            grid = replace(template, rows=anchors, columns=candidates, directions=("rows",))
            found.append(Layout(grid))
        return found

    def _candidates(self, pairs: Pairs, modality: Modality, group: Group, anchors: Side) -> Side:
        own = pairs.side(modality, tuple(anchors.info))
        own = replace(own, features=own["teacher_features"].detach())
        own = own.know(in_queue=torch.zeros_like(own.number))
        queue = self.image_features if modality == "image" else self.text_features
        queue = queue.to(own.features.dtype)
        entries = torch.ones(len(queue), dtype=torch.long, device=queue.device)
        return lengthened(
            gathered(own, group), queue, teacher_features=queue, sample_ids=self.sample_ids, in_queue=entries
        )

    def log_weight(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """-inf at older features of the anchor's own sample."""
        return torch.zeros_like(tile.logits).masked_fill_(older_self(tile), -torch.inf)

    @torch.no_grad()
    def after_step(self, pairs: Pairs) -> None:
        """The batch of all ranks enters, whatever their groups, and the oldest entries leave."""
        world = world_group()
        own_image, own_text = pairs.side("image", self.needs), pairs.side("text", self.needs)
        image = all_gather_rows(own_image["teacher_features"], world)
        text = all_gather_rows(own_text["teacher_features"], world)
        ids = all_gather_rows(own_image["sample_ids"], world)
        self.image_features = self._kept(self.image_features, image)
        self.text_features = self._kept(self.text_features, text)
        self.sample_ids = self._kept(self.sample_ids, ids)

    def _kept(self, old: Tensor, new: Tensor) -> Tensor:
        joined = torch.cat([old, new.to(old.dtype)])
        return joined[max(len(joined) - self._size, 0) :]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: object) -> None:
        for name in ("image_features", "text_features", "sample_ids"):  # a checkpoint's queue may be longer or shorter
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        for name in ("image_features", "text_features", "sample_ids"):
            setattr(self, name, self._kept(getattr(self, name), getattr(self, name)[:0]))
