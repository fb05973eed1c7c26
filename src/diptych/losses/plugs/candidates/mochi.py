"""Hard negatives mixed from hard negatives."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diptych.distributed.groups import Group
from diptych.losses.batch import Moment, Pairs
from diptych.losses.grid import Grid
from diptych.losses.hardest import hardest
from diptych.losses.pairs import Direction
from diptych.losses.plugs.candidates.hard_captions import add_local
from diptych.losses.plugs.family import Candidates, Layout
from diptych.seeding import generator


@dataclass(frozen=True)
class Mochi(Candidates, name="mochi"):
    """Synthetic negatives of each anchor q, from its N hardest candidates n; under stop-gradient.

        mixed  times   h = norm(a·n_i + (1−a)·n_j),   a ~ U(0, 1)
        queried times  h = norm(b·q + (1−b)·n_j),     b ~ U(0, 0.5)

    i, j are drawn anew for every point. The same seed and step give the same points, however the batch lies on ranks.
    Source: arXiv:2010.01028.
    Cost: a pass over all pairs and a gather of images before the loss; B·(mixed + queried)·D numbers per direction.
    Use: after some thousand steps without it, with moderate numbers; the paper's (1024, 1024, 128) belong to a queue.
    Verified: dense float64 given the points; mixed = queried = 0 equals CLIP; equal seeds, equal points.
    """

    hardest: int = 64
    """N."""
    mixed: int = 32
    """Points between two negatives, per anchor."""
    queried: int = 8
    """Points between anchor and negative, per anchor."""
    start_samples: int = 0
    """Samples seen before the first point is made."""

    def __post_init__(self) -> None:
        if self.hardest < 1 or self.mixed < 0 or self.queried < 0:
            numbers = f"{self.hardest}, {self.mixed}, {self.queried}"
            raise ValueError(f"hardest must be at least 1 and mixed, queried not negative: {numbers}")

    def layouts(self, layouts: list[Layout], pairs: Pairs, group: Group, moment: Moment) -> list[Layout]:
        """Each anchor with its synthetic negatives."""
        if moment.samples_seen < self.start_samples or not self.mixed + self.queried:
            return layouts
        found = []
        for layout in layouts:
            for direction in layout.grid.directions:
                points = self.points(layout.grid, direction, moment)
                if points is not None:
                    layout = add_local(layout, {layout.grid.anchors(direction).modality: points})
            found.append(layout)
        return found

    @torch.no_grad()
    def points(self, grid: Grid, direction: Direction, moment: Moment) -> Float[Tensor, "B K D"] | None:
        """The synthetic negatives of this rank's anchors; None where there are no negatives to mix."""
        anchors = grid.anchors(direction)
        count = min(self.hardest, grid.num_candidates(direction) - 1)
        if count < 1:
            return None
        found = hardest(grid, direction, count, allowed=lambda tile: ~tile.own())
        rng = generator(moment.seed, "mochi", moment.step, anchors.modality)
        total = len(anchors) * grid.group.size
        own = slice(grid.group.rank * len(anchors), (grid.group.rank + 1) * len(anchors))

        def drawn(values: np.ndarray) -> Tensor:
            """This rank's part of what is drawn for the whole group."""
            return torch.from_numpy(values[own]).to(anchors.features.device)

        def picked(number: int) -> Tensor:
            chosen = drawn(rng.integers(0, count, (total, number)))
            return found.candidates.features[found.place.gather(1, chosen)]

        share = drawn(rng.random((total, self.mixed, 1))).to(anchors.features.dtype)
        between = share * picked(self.mixed) + (1 - share) * picked(self.mixed)
        share = drawn(rng.random((total, self.queried, 1)) / 2).to(anchors.features.dtype)
        towards = share * anchors.features[:, None, :] + (1 - share) * picked(self.queried)
        return F.normalize(torch.cat([between, towards], 1), dim=2)
