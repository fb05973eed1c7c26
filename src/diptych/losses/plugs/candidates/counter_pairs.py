"""Pictures of wrong captions, and these captions, as candidates for all."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.distributed.collectives import all_gather, all_gather_rows
from diptych.distributed.groups import Group
from diptych.errors import ConfigError
from diptych.losses.batch import Moment, Pairs
from diptych.losses.pairs import Tile, known_of
from diptych.losses.plugs.candidates.hard_captions import lengthened
from diptych.losses.plugs.family import Candidates, Layout


@dataclass(frozen=True)
class CounterPairs(Candidates, name="counter_pairs"):
    """Every picture is compared with the captions of all counter-images, every caption with all counter-images.

        C_i = {T_j} ∪ {T⁻_j}   for images;   {I_j} ∪ {I⁻_j}   for texts;   j of T⁻, I⁻: pictures that have one

    With the targets `same_caption`, counter-images of a caption that is somebody's own are right for it.
    Source: arXiv:2311.03964: rows and columns extended by generated negatives. The regulariser `counter_images` besides
    teaches which counter-image belongs to which of these captions.
    Cost: both towers see as many counter-images as pictures; twice the products; a gather of either side.
    Use: `data.counter_images`.
    Verified: dense float64, across ranks; without counter-images it equals CLIP.
    """

    needs: ClassVar[tuple[str, ...]] = ("counter_present",)

    def layouts(self, layouts: list[Layout], pairs: Pairs, group: Group, moment: Moment) -> list[Layout]:
        """Captions of counter-images behind texts, counter-images behind images.

        Raises:
            ConfigError: the counter-images are not there.
        """
        return [self._extended(layout, pairs, group) for layout in layouts]

    def _extended(self, layout: Layout, pairs: Pairs, group: Group) -> Layout:
        grid = layout.grid
        for direction in grid.directions:
            side = grid.columns if direction == "rows" else grid.rows
            features = pairs.counter_texts if side.modality == "text" else pairs.counter_images
            if features is None:
                raise ConfigError("the batch brings no counter-images · objective · set data.counter_images")
            present = pairs.known["counter_present"]
            info = {"counter_absent": (~present).long()}
            if "caption_ids" in side.info:
                info["caption_ids"] = known_of(side.modality, pairs.known, "counter_ids").where(present, -1)
            if direction == "rows":  # columns are those of all ranks, rows each rank's own
                features = all_gather(features, group)
                info = {name: all_gather_rows(value, group) for name, value in info.items()}
            side = lengthened(side.know(counter_absent=torch.zeros_like(side.number)), features, **info)
            grid = replace(grid, columns=side) if direction == "rows" else replace(grid, rows=side)
        return replace(layout, grid=grid)

    def log_weight(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """-inf where there is no counter-image."""
        absent = tile.candidate.info.get("counter_absent")
        if absent is None:
            return None
        return torch.zeros_like(tile.logits).masked_fill_((absent == 1)[None, :], -torch.inf)
