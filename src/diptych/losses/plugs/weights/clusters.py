"""Negatives that keep falling into the anchor's cluster count less."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.distributed.collectives import all_gather_rows
from diptych.losses.batch import Moment
from diptych.losses.grid import Grid
from diptych.losses.pairs import Modality, Tile
from diptych.losses.plugs.family import Weights


@dataclass(frozen=True)
class Clusters(Weights, name="clusters"):
    """Features of one modality are clustered several times; a pair's weight falls with the number of shared clusters.

        w_ij = 1 − (clusterings in which i and j share a cluster) / K;   so w_ii = 0, as in `decoupled`

    Source: arXiv:2212.13847, weighted negatives (K clusterings of different numbers of clusters; weights over K here).
    Cost: k-means over the group's batch at every step, and K comparisons per pair.
    Use: batches with many near-duplicates.
    Verified: dense float64 given the clusters; one cluster per sample equals `decoupled`.
    """

    numbers: tuple[int, ...] = (32, 64)
    """Numbers of clusters, one for each of the K clusterings."""
    modality: Modality = "image"
    """Whose features are clustered."""
    iterations: int = 10
    """Steps of k-means."""

    def __post_init__(self) -> None:
        if not self.numbers or min(self.numbers) < 1 or self.iterations < 0:
            raise ValueError(f"numbers must be one or more positive ones, not {list(self.numbers)}")

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """Clusters of every pair."""
        own = grid.own_of(self.modality).features.detach()
        everyone = all_gather_rows(own, grid.group)
        found = torch.stack([kmeans(everyone, number, self.iterations) for number in self.numbers], 1)
        mine = found[grid.group.rank * len(own) : (grid.group.rank + 1) * len(own)]
        return grid.know("clusters", rows=mine, columns=mine)

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """log w."""
        anchor, candidate = tile.anchor["clusters"], tile.candidate["clusters"]
        shared = torch.zeros_like(tile.logits)
        for k in range(anchor.shape[1]):
            shared += anchor[:, None, k] == candidate[None, :, k]
        return torch.log1p(-shared / anchor.shape[1])


def kmeans(features: Float[Tensor, "N D"], number: int, iterations: int) -> Int[Tensor, " N"]:
    """Clusters by cosine; centres start at evenly spaced samples, so equal input gives equal clusters."""
    number = min(number, len(features))
    start = torch.arange(number, device=features.device) * len(features) // number
    centres = features[start]
    for _ in range(iterations):
        nearest = (features @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    return (features @ centres.T).argmax(1)
