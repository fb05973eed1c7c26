"""The plug points of a contrastive loss: one base class each. A plug is one file in the folder of its family.

    loss_i = α_i · [ log Σ_k w_ik exp(z_ik) − Σ_j π_ij z_ij ]         z = similarity x over the temperature

| family | gives | sees |
|---|---|---|
| `Similarity` | x_ij | both sides of a tile |
| `Temperature` | z_ij | a tile with its similarities |
| `Targets` | π_ij | a tile |
| `Weights` | log w_ij; -inf drops the candidate | a tile |
| `Candidates` | more rows, columns, or candidates of single anchors | the batch |
| `Normaliser` | how an anchor's logits become its loss | reductions over all pairs |
| `Denominator` | what stands for log Σ exp | one number per anchor |
| `SampleWeight` | α_i | one loss per anchor |
| `Regulariser` | a term of its own | the batch |

A tile is seen from its anchors: rows are anchors, columns candidates. The engine calls a plug for images as anchors
and, with the tile turned, for texts; a `symmetric` plug gives a pair the same value from both sides and is called once.
A plug that needs something of all candidates first (a normaliser, a threshold) finds it in `prepare` and attaches it to
the sides; plugs that keep state between steps return a module from `build`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from jaxtyping import Float
from torch import Tensor, nn

from diptych.config import Choice
from diptych.distributed.groups import Group
from diptych.losses.batch import Moment, Pairs
from diptych.losses.grid import Grid
from diptych.losses.pairs import Direction, Side, Tile


class Plug:
    """What all plugs share."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Names that both sides must know, such as `caption_ids`."""
    symmetric: ClassVar[bool] = True
    """Whether a pair gets the same value whichever of the two is the anchor."""

    def build(self, embed_dim: int) -> Self | nn.Module:
        """What is called in training: itself, or a module with state and parameters."""
        return self

    def prepare(self, grid: Grid, moment: Moment) -> Grid:
        """Attaches what the tiles will need. Every rank of the group calls."""
        return grid

    def teacher_width(self, embed_dim: int) -> int | None:
        """How wide `teacher_features` must be; None: as they like, or they are not looked at."""
        return None


class Similarity(Plug, Choice):
    """How alike two features are."""

    def width(self, embed_dim: int) -> int:
        """Width of what is compared. Raises ConfigError where it does not fit `embed_dim`."""
        return embed_dim

    def heads(self, grid: Grid) -> list[Grid]:
        """The grids whose losses are averaged: one, unless features are divided into heads."""
        return [grid]

    def __call__(self, rows: Side, columns: Side, shared: Mapping[str, Tensor]) -> Float[Tensor, "R C"]:
        """Similarities of a tile."""
        raise NotImplementedError


class Temperature(Plug, Choice):
    """From similarities to logits."""

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"]:
        """Logits of a tile."""
        raise NotImplementedError

    def penalty(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """What a temperature costs; summed over an anchor's candidates and added to its loss."""
        return None


class Targets(Plug, Choice):
    """Which candidates are right for an anchor, and how right."""

    normalise: ClassVar[bool] = True
    """Whether an anchor's targets are divided by their sum."""

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """Targets of a tile, at least 0; None: none of its candidates is right."""
        raise NotImplementedError


class Weights(Plug, Choice):
    """How much a candidate counts in an anchor's denominator."""

    def __call__(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """Logarithms of the weights; -inf: not a candidate; None: 0 everywhere."""
        raise NotImplementedError


@dataclass(frozen=True)
class Local:
    """Candidates that only one anchor meets, for each anchor as many."""

    features: Float[Tensor, "B K D"]
    targets: Float[Tensor, "B K"]
    """1 for those that are right, else 0."""


@dataclass(frozen=True)
class Layout:
    """Who is compared with whom."""

    grid: Grid
    local: Mapping[Direction, Local] = field(default_factory=dict)
    """Candidates of single anchors, beside the grid's."""


class Candidates(Plug, Choice):
    """Candidates beside those of the batch."""

    def layouts(self, layouts: list[Layout], pairs: Pairs, group: Group, moment: Moment) -> list[Layout]:
        """The layouts with more candidates in them. Every rank of the group calls."""
        raise NotImplementedError

    def log_weight(self, tile: Tile) -> Float[Tensor, "R C"] | None:
        """-inf where one of its candidates must not meet an anchor; None where none of them is in the tile."""
        return None

    def after_step(self, pairs: Pairs) -> None:
        """Takes note of the batch, when its loss has been computed. Every rank of the world calls."""


@dataclass(frozen=True)
class AnchorSums:
    """What the candidates of each anchor add up to."""

    anchors: Side
    log_sum: Float[Tensor, " B"]
    """log Σ_k w_ik exp(z_ik)."""
    positive: Float[Tensor, " B"]
    """Σ_j π_ij z_ij."""
    num_candidates: Float[Tensor, " B"]
    """How many of them have a weight above 0; all of them unless a denominator `wants_count`."""
    mean_logit: Float[Tensor, " B"] | None
    """Σ_k p_ik z_ik with p_ik = w_ik exp(z_ik) / Σ; where a denominator `wants_mean_logit`."""
    logit_scale: Float[Tensor, ""]


class Denominator(Plug, Choice):
    """What stands for the logarithm of the denominator."""

    drops_own: ClassVar[bool] = False
    """Whether the own partner must not be a candidate."""
    wants_count: ClassVar[bool] = False
    """Whether it uses `AnchorSums.num_candidates` where candidates may be dropped."""
    wants_mean_logit: ClassVar[bool] = False

    def losses(self, sums: AnchorSums) -> Float[Tensor, " B"]:
        """The loss of each anchor. Every rank of the world calls, images before texts."""
        raise NotImplementedError


class SampleWeight(Plug, Choice):
    """How much an anchor counts."""

    def __call__(
        self, losses: Float[Tensor, " B"], known: Mapping[str, Tensor], group: Group, moment: Moment
    ) -> Float[Tensor, " B"]:
        """Factors α without gradient, of mean 1 over the group unless the plug says otherwise."""
        raise NotImplementedError


class Regulariser(Plug, Choice):
    """A term beside the contrastive one; its field `weight` is its factor in the total."""

    weight: float

    def __call__(self, pairs: Pairs, group: Group) -> Float[Tensor, ""]:
        """The value; its mean over the ranks is the batch's. Every rank of the group calls."""
        raise NotImplementedError
