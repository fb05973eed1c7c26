"""Wrong captions written for the picture, as candidates."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.distributed.collectives import all_gather, all_gather_rows
from diptych.distributed.groups import Group
from diptych.errors import ConfigError
from diptych.losses.batch import Moment, Pairs
from diptych.losses.pairs import Side, known_of
from diptych.losses.plugs.family import Candidates, Layout, Local


@dataclass(frozen=True)
class HardCaptions(Candidates, name="hard_captions"):
    """Every picture is compared with the hard captions of all pictures of the group; no caption gets more pictures.

        C_i = {T_j} ∪ {H_jk : all j, k}   for images;   {I_j} for texts

    With the targets `same_caption`, hard captions that are a picture's own caption are right for it, not wrong.
    Source: arXiv:2210.01936 (NegCLIP); the global term of arXiv:2504.16801.
    Cost: K more columns per pair: (1 + K) times the products of one direction.
    Use: captions rewritten by swapping, replacing or adding words.
    Verified: dense float64, across ranks; K = 0 equals CLIP.
    """

    def layouts(self, layouts: list[Layout], pairs: Pairs, group: Group, moment: Moment) -> list[Layout]:
        """Hard captions of all ranks behind the text columns."""
        local = known_hard_captions(pairs)
        everyone = all_gather(local.to(pairs.image_features.dtype).flatten(0, 1), group)
        return [
            with_columns(layout, everyone, **_ids(layout, pairs, group)) if _columns_are_texts(layout) else layout
            for layout in layouts
        ]


@dataclass(frozen=True)
class OwnHardCaptions(Candidates, name="own_hard_captions"):
    """Every picture is compared with its own hard captions only, beside the texts of the group.

        C_i = {T_j} ∪ {H_ik : all k}

    Source: arXiv:2310.08753 (CompA); hard captions of others are not wrong for sure.
    Cost: B·K products; nothing is gathered.
    Use: as `hard_captions`, when a picture's hard captions may be true of other pictures.
    Verified: dense float64, across ranks; K = 0 equals CLIP.
    """

    def layouts(self, layouts: list[Layout], pairs: Pairs, group: Group, moment: Moment) -> list[Layout]:
        """Each image anchor with its own hard captions."""
        local = known_hard_captions(pairs)
        return [add_local(layout, {"image": local}) for layout in layouts]


def known_hard_captions(pairs: Pairs) -> Float[Tensor, "B K D"]:
    """The batch's hard captions. Raises ConfigError when it has none."""
    if pairs.hard_captions is None:
        raise ConfigError(
            "the batch brings no hard captions · objective · pass Pairs(hard_captions=…) or drop what uses them"
        )
    return pairs.hard_captions


def add_local(layout: Layout, by_modality: Mapping[str, Float[Tensor, "B K D"]], *, right: bool = False) -> Layout:
    """The layout with more candidates of single anchors, wrong ones or right ones."""
    local = dict(layout.local)
    for direction in layout.grid.directions:
        side = layout.grid.rows if direction == "rows" else layout.grid.columns
        extra = by_modality.get(side.modality)
        if extra is not None:
            added = Local(extra.to(side.features.dtype), side.features.new_full(extra.shape[:2], float(right)))
            known = local.get(direction)
            local[direction] = (
                added
                if known is None
                else Local(torch.cat([known.features, added.features], 1), torch.cat([known.targets, added.targets], 1))
            )
    return replace(layout, local=local)


def with_columns(layout: Layout, features: Float[Tensor, "E D"], **info: Tensor) -> Layout:
    """The layout with more columns, which are nobody's partner."""
    return replace(layout, grid=replace(layout.grid, columns=lengthened(layout.grid.columns, features, **info)))


def lengthened(side: Side, features: Float[Tensor, "E D"], **info: Tensor) -> Side:
    """The side with candidates that are no anchors behind it.

    What `info` does not say of them is 0, and -1 where it is an integer: no id, no part of any pair.
    """
    count = len(features)
    known = {}
    for name, value in side.info.items():
        unknown = value.new_full((count, *value.shape[1:]), 0 if value.is_floating_point() else -1)
        known[name] = torch.cat([value, info.get(name, unknown).to(value.dtype)])
    # Another negative number for either side, so that no two candidates look like partners.
    number = side.number.new_full((count,), -1 if side.modality == "text" else -2)
    return replace(
        side,
        features=torch.cat([side.features, features.to(side.features.dtype)]),
        number=torch.cat([side.number, number]),
        info=known,
    )


def _ids(layout: Layout, pairs: Pairs, group: Group) -> dict[str, Tensor]:
    """Which captions hard ones are equal to, where a plug looks at that. Raises ConfigError where it is not known."""
    if "caption_ids" not in layout.grid.columns.info:
        return {}
    return {"caption_ids": all_gather_rows(known_of("text", pairs.known, "hard_ids").flatten(), group)}


def _columns_are_texts(layout: Layout) -> bool:
    return "rows" in layout.grid.directions and layout.grid.columns.modality == "text"
