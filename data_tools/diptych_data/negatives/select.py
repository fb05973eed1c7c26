"""Which of a picture's candidates it gets."""

import math
from collections import Counter
from collections.abc import Sequence

from diptych.seeding import derive
from diptych_data.negatives.candidate import Negative


def noise(one: Negative, seed: int, number: int) -> float:
    """A Gumbel draw of the candidate's own: the greatest of such sums is a draw by softmax.

    Args:
        number: of the sample; two pictures with one caption are not to get the same negatives.
    """
    uniform = (derive(seed, "choice", number, one.how, one.text, one.of) + 0.5) / (1 << 63)
    return -math.log(-math.log(uniform))


def choose(
    candidates: Sequence[Negative], keys: Sequence[float | None], count: int, taken: Counter[str]
) -> list[Negative]:
    """At most `count` candidates: again and again the greatest key of the kind that was taken least so far.

    Args:
        keys: None: not to be taken.
        taken: kind → how often it was taken for the pictures before; what is taken here is added.
    """
    left: dict[str, list[int]] = {}
    for place, (one, key) in enumerate(zip(candidates, keys, strict=True)):
        if key is not None:
            left.setdefault(one.kind, []).append(place)
    for places in left.values():
        places.sort(key=lambda place: (keys[place] or 0.0, -place))
    chosen: list[Negative] = []
    while left and len(chosen) < count:
        kind = min(left, key=lambda name: (taken[name], name))
        chosen.append(candidates[left[kind].pop()])
        taken[kind] += 1
        if not left[kind]:
            del left[kind]
    return chosen
