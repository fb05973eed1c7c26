"""Which of many things stay when some are near others: the foremost first, none near one that stays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Edges(NamedTuple):
    """Pairs of places that are near each other; each pair once, in no order."""

    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray


NO_EDGES = Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))


@dataclass(frozen=True)
class Near:
    """What lies near what, in a form that answers by place."""

    _starts: np.ndarray
    _others: np.ndarray
    _distances: np.ndarray

    @classmethod
    def of(cls, edges: Edges, count: int) -> "Near":
        """Both directions of the pairs among `count` places, the nearest first."""
        one = np.concatenate([edges.first, edges.second])
        other = np.concatenate([edges.second, edges.first])
        distance = np.concatenate([edges.distance, edges.distance])
        order = np.lexsort((other, distance, one))
        starts = np.searchsorted(one[order], np.arange(count + 1))
        return cls(starts, other[order], distance[order])

    def to(self, place: int) -> list[tuple[int, float]]:
        """(place, distance) of everything near, the nearest first."""
        low, high = self._starts[place], self._starts[place + 1]
        return list(zip(self._others[low:high].tolist(), self._distances[low:high].tolist(), strict=True))


class Dropped(NamedTuple):
    """One that goes, for one that stays."""

    place: int
    kept: int
    by: str
    """`hash` or `model`."""
    distance: float


@dataclass(frozen=True)
class Places:
    """What is to be chosen from."""

    priority: np.ndarray
    """The places, the foremost first."""
    groups: np.ndarray
    """Place → number of its group; the members of a group are all near each other."""
    near_groups: Edges
    """Groups of which some members may be near: `alike` decides."""
    near_places: Edges
    alike: Callable[[int, int], bool]
    """Whether two places of near groups are near themselves."""


def choose(places: Places) -> list[Dropped]:
    """What goes, in the order of the places.

    Visits the places in their priority; one is dropped when a member of its own group stays (distance 0), or one of a
    near group that is alike, or a place near to it. So a thousand copies are one node and not half a million pairs.
    """
    by_hash = Near.of(places.near_groups, int(places.groups.max(initial=-1)) + 1)
    by_model = Near.of(places.near_places, len(places.groups))
    stays = np.zeros(len(places.groups), bool)
    keeper: dict[int, int] = {}
    """Group → its foremost member that stays; with groups there is no second."""
    dropped = []
    for place in places.priority.tolist():
        group = int(places.groups[place])
        near = [(group, 0.0), *by_hash.to(group)]
        hits = ((keeper[other], "hash", distance) for other, distance in near if other in keeper)
        found = next((hit for hit in hits if places.alike(place, hit[0])), None)
        if found is None:
            found = next(((other, "model", distance) for other, distance in by_model.to(place) if stays[other]), None)
        if found is not None:
            dropped.append(Dropped(place, *found))
        else:
            stays[place] = True
            keeper.setdefault(group, place)
    return sorted(dropped)
