"""Further captions of a picture that are right too."""

from dataclasses import dataclass

from diptych.distributed.groups import Group
from diptych.errors import ConfigError
from diptych.losses.batch import Moment, Pairs
from diptych.losses.plugs.candidates.hard_captions import add_local
from diptych.losses.plugs.family import Candidates, Layout


@dataclass(frozen=True)
class PositiveCaptions(Candidates, name="positive_captions"):
    """A picture's further captions are right for it, in equal shares with its own; other pictures do not meet them.

        C_i = {T_j} ∪ {P_ik : all k};   π_i: 1 on T_i and on every P_ik, normalised

    Source: arXiv:2310.08753 (CompA), modular contrast: sub-captions of growing granularity as several positives. They
    are often true of other pictures, which therefore do not meet them. With `own_hard_captions` each picture chooses
    among all of its own captions, true and false, beside the batch's.
    Cost: B·P products; nothing is gathered. The text tower reads P captions more.
    Use: `data.captions.positive`: parts and paraphrases, as `diptych data negatives` writes them.
    Verified: dense float64, across ranks; P = 0 equals CLIP.
    """

    def layouts(self, layouts: list[Layout], pairs: Pairs, group: Group, moment: Moment) -> list[Layout]:
        """Each image anchor with its further captions.

        Raises:
            ConfigError: the batch has none.
        """
        if pairs.positive_captions is None:
            raise ConfigError("the batch brings no further captions · objective · set data.captions.positive")
        return [add_local(layout, {"image": pairs.positive_captions}, right=True) for layout in layouts]
