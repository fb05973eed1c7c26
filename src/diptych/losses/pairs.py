"""What a loss is made of: two sides, and tiles of the matrix of all their pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.errors import ConfigError

Modality = Literal["image", "text"]
Direction = Literal["rows", "columns"]
OPPOSITE: tuple[tuple[Modality, Modality], ...] = (("image", "text"), ("text", "image"))


def known_of(modality: Modality, info: Mapping[str, Tensor], name: str) -> Tensor:
    """What is known under a name. Raises ConfigError when nobody gave it."""
    if name not in info:
        raise ConfigError(f"{name} of the {modality}s is not known · contrastive loss · pass it along")
    return info[name]


@dataclass(frozen=True)
class Side:
    """The rows, or the columns, of the matrix of all pairs: anchors first, then candidates that are nobody's anchor."""

    modality: Modality
    features: Float[Tensor, "N D"]
    """Unit norm, float32 or float64."""
    number: Int[Tensor, " N"]
    """Which pair of the group it belongs to: equal numbers on both sides are partners. Negative: to none."""
    num_anchors: int
    """Those before this place are anchors; the rest (a queue, hard captions) only candidates."""
    info: Mapping[str, Tensor] = field(default_factory=dict)
    """Whatever else is known of each, with leading axis N: caption_ids, sample_ids, teacher_features, …"""

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor with leading axis N. Raises ConfigError when nobody gave it."""
        return known_of(self.modality, self.info, name)

    def cut(self, at: slice) -> Self:
        """A part of it."""
        info = {name: value[at] for name, value in self.info.items()}
        anchors = min(max(self.num_anchors - at.start, 0), at.stop - at.start)
        return replace(self, features=self.features[at], number=self.number[at], num_anchors=anchors, info=info)

    def know(self, **tensors: Tensor) -> Self:
        """The same with more known of it."""
        return replace(self, info={**self.info, **tensors})


@dataclass(frozen=True)
class Tile:
    """A block of the matrix of all pairs, seen from its anchors: rows are anchors, columns their candidates."""

    similarity: Float[Tensor, "R C"]
    """x: cosines, or what the similarity plug makes of the features."""
    logits: Float[Tensor, "R C"]
    """z: similarities over the temperature."""
    anchor: Side
    candidate: Side
    shared: Mapping[str, Tensor]
    """What belongs to no row and no column: logit_scale, parameters of plugs."""

    def own(self) -> Bool[Tensor, "R C"]:
        """Which entries are an anchor with its own partner."""
        return self.anchor.number[:, None] == self.candidate.number[None, :]

    def has_own(self) -> bool:
        """Whether any entry may be an anchor with its own partner; most tiles hold none.

        Always true on CUDA, where looking would be a synchronisation.
        """
        if self.logits.is_cuda:
            return True
        mine, theirs = self.anchor.number, self.candidate.number
        return bool((mine.amin() <= theirs.amax()) & (theirs.amin() <= mine.amax()))

    def same(self, name: str) -> Bool[Tensor, "R C"]:
        """Where anchor and candidate agree in `name`; the own partner always does."""
        return (self.anchor[name][:, None] == self.candidate[name][None, :]) | self.own()

    def flipped(self, logits: Float[Tensor, "C R"] | None = None) -> "Tile":
        """The same block seen from the other side."""
        turned = self.logits.T if logits is None else logits
        return Tile(self.similarity.T, turned, self.candidate, self.anchor, self.shared)
