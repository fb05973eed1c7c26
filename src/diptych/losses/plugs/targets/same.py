"""Everything that carries the anchor's caption, or its label, is right."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diptych.losses.pairs import Tile
from diptych.losses.plugs.family import Targets


@dataclass(frozen=True)
class SameCaption(Targets, name="same_caption"):
    """Equal captions in a batch are right for all pictures that carry them, in equal shares.

        π_ij = [c_i = c_j] / Σ_k [c_i = c_k]

    Source: arXiv:2004.11362, eq. 2, with captions for classes.
    Cost: one comparison per pair.
    Use: data with repeated captions (class names, product titles); otherwise a caption is pushed away from itself.
    Verified: dense float64, repeated ids across ranks; distinct captions equal `identity`.
    """

    needs: ClassVar[tuple[str, ...]] = ("caption_ids",)

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """1 where captions are equal."""
        return tile.same("caption_ids").to(tile.logits.dtype)


@dataclass(frozen=True)
class SameLabel(Targets, name="same_label"):
    """Everything of the anchor's class is right, in equal shares.

        π_ij = [y_i = y_j] / Σ_k [y_i = y_k]

    Source: arXiv:2004.11362, eq. 2; arXiv:2204.03610 for images and texts.
    Cost: one comparison per pair.
    Use: labelled pictures; `labels` must come with the batch.
    Verified: dense float64, repeated ids across ranks; distinct labels equal `identity`.
    """

    needs: ClassVar[tuple[str, ...]] = ("labels",)

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """1 where labels are equal."""
        return tile.same("labels").to(tile.logits.dtype)
