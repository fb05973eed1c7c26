"""Every candidate is as right as its label resembles the anchor's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Targets


@dataclass(frozen=True)
class SoftLabels(Targets, name="soft_labels"):
    """Targets are a softmax of the similarity of label embeddings.

        π_ij ∝ exp(⟨l_i, l_j⟩ / τ′)

    l are `label_features` of unit norm: embeddings of labels, or of captions by a text embedder.
    Source: arXiv:2410.18481 (τ′ = 0.35 in the published models).
    Cost: one more product per pair, of the embedder's width.
    Use: labels that resemble each other (actions, fine-grained classes).
    Verified: dense float64; τ′ → 0 equals `same_label`.
    """

    needs: ClassVar[tuple[str, ...]] = ("label_features",)
    temperature: float = 0.35
    """τ′, above 0."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """exp((⟨l_i, l_j⟩ − 1) / τ′): the shift cancels and keeps the largest near 1."""
        alike = tile.anchor["label_features"] @ tile.candidate["label_features"].T
        return torch.exp((alike.to(tile.logits.dtype) - 1) / self.temperature)
