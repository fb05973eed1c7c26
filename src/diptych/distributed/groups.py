"""Which ranks compare their features with each other."""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from diptych.config import Config
from diptych.distributed.runtime import ranks_per_node
from diptych.errors import DistributedError

Pattern = Literal["contiguous", "strided", "alternating"]


@dataclass(frozen=True)
class Group:
    """A set of ranks that gather together, as one of its members sees it."""

    rank: int = 0
    """This process's place in the group."""
    size: int = 1
    handle: dist.ProcessGroup | None = None
    """What torch calls it; None: torch's default group, or no other process."""


ALONE = Group()


def world_group() -> Group:
    """All ranks; this process alone outside a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Group(dist.get_rank(), dist.get_world_size())


@dataclass(frozen=True)
class GatherConfig(Config):
    """Whose features a rank's own are compared with (arXiv:2401.15896: smaller groups, less traffic and work)."""

    scope: Literal["all", "node", "group", "rank"] = "all"
    """`all` ranks; those of the same `node`; a `group` of group_size ranks; each `rank` for itself."""
    group_size: int | None = None
    """Ranks in a group, for scope `group`; must divide the number of ranks."""
    pattern: Pattern = "contiguous"
    """Groups of neighbours (0 1 | 2 3), of ranks far apart (0 2 | 1 3), or the one and the other on alternate steps."""
    form: Literal["one_sided", "two_sided"] = "one_sided"
    """`one_sided` gathers the texts alone and merges statistics: the same loss, half the traffic and half the products
    of `two_sided`, the plain form."""

    def __post_init__(self) -> None:
        if (self.scope == "group") != (self.group_size is not None):
            raise ValueError("group_size belongs to scope `group`, and scope `group` needs it; set both or neither")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {self.group_size}")


class Groups:
    """This process's group at every step."""

    def __init__(self, by_phase: tuple[Group, ...]) -> None:
        self._by_phase = by_phase

    def at(self, step: int) -> Group:
        """The group that optimizer step `step` (from 0) gathers over."""
        return self._by_phase[step % len(self._by_phase)]


def make_groups(config: GatherConfig) -> Groups:
    """The groups of a run. Every rank of the world must call, once: process groups are made here.

    Raises:
        DistributedError: the ranks cannot be divided into groups of the size.
    """
    world = world_group()
    if config.scope == "node":
        _check_nodes(ranks_per_node(world.size), world)
    size = group_size(config, world.size)
    patterns = ("contiguous", "strided") if config.pattern == "alternating" else (config.pattern,)
    return Groups(tuple(_group(partition(world.size, size, pattern=pattern), world) for pattern in patterns))


def _check_nodes(mine: int, world: Group) -> None:
    """Raises DistributedError, on every rank, where nodes have different numbers of ranks."""
    if world.size == 1:
        return
    everyone: list[int] = [0] * world.size
    dist.all_gather_object(everyone, mine)
    if len(set(everyone)) > 1:
        raise DistributedError(
            f"nodes of {', '.join(map(str, sorted(set(everyone))))} ranks are no equal groups · "
            "objective.contrastive.gather · use scope `group` with a group_size that divides all of them, or `all`"
        )


def group_size(config: GatherConfig, world_size: int) -> int:
    """Ranks per group. Raises DistributedError where they do not divide the world."""
    match config.scope:
        case "all":
            return world_size
        case "rank":
            return 1
        case "node":
            size, key = ranks_per_node(world_size), "ranks per node"
        case "group":
            size, key = config.group_size or 1, "group_size"
    if world_size % size:
        divisors = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        raise DistributedError(
            f"{world_size} ranks cannot be divided into groups of {size} ({world_size % size} would remain) · "
            f"objective.contrastive.gather ({key}) · use one of {', '.join(divisors)}"
        )
    return size


def partition(world_size: int, size: int, *, pattern: str) -> list[list[int]]:
    """All groups of `size` ranks: neighbours, or every (world_size / size)-th rank."""
    number = world_size // size
    if pattern == "strided":
        return [list(range(first, world_size, number)) for first in range(number)]
    return [list(range(first * size, (first + 1) * size)) for first in range(number)]


def _group(members: list[list[int]], world: Group) -> Group:
    if len(members) == 1:
        return world
    if len(members[0]) == 1:
        return ALONE
    mine = ALONE
    for ranks in members:  # every rank takes part in making every group
        handle = dist.new_group(ranks)
        if world.rank in ranks:
            mine = Group(ranks.index(world.rank), len(ranks), handle)
    return mine
