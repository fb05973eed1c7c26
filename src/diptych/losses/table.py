"""Numbers that are kept for every sample of the data set, divided over the ranks."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.distributed.collectives import all_gather_rows, merge
from diptych.distributed.groups import world_group


class SampleTable(nn.Module):
    """`width` float32 numbers for each of `size` slots; a sample's slot is its id modulo `size`.

    Ids from 0 to size − 1 have slots of their own; hashed ids share some. Slot s lies on rank s mod W, whatever the
    group that a loss gathers over: memory per rank is size·width/W. `state_dict` holds the slots of this rank; `whole`
    and `take` move all of them, so a checkpoint fits any number of ranks.
    """

    values: Tensor

    def __init__(self, size: int, initial: tuple[float, ...]) -> None:
        super().__init__()
        world = world_group()
        self.size = size
        self._rank, self._world = world.rank, world.size
        slots = len(range(world.rank, size, world.size))
        self.register_buffer("values", torch.tensor(initial).repeat(slots, 1))

    def look_up(self, ids: Int[Tensor, " B"]) -> Float[Tensor, "B width"]:
        """The numbers of this rank's samples. Every rank of the world must call."""
        slots = all_gather_rows(ids, world_group()) % self.size
        found = self.values.new_zeros(len(slots), self.values.shape[1])
        mine = slots % self._world == self._rank
        found[mine] = self.values[slots[mine] // self._world]
        shares = [merge(column, "sum", world_group()) for column in found.unbind(1)]
        return torch.stack(shares, 1)

    def store(self, ids: Int[Tensor, " B"], values: Float[Tensor, "B width"]) -> None:
        """Replaces the numbers of this rank's samples; of a slot that comes several times the last in rank order wins.

        Every rank of the world must call.
        """
        slots = all_gather_rows(ids, world_group()) % self.size
        everyone = all_gather_rows(values.to(self.values.dtype), world_group())
        unique, place = torch.unique(slots, return_inverse=True)
        order = torch.arange(len(slots), device=slots.device)
        last = torch.zeros_like(unique).scatter_reduce(0, place, order, "amax")
        mine = unique % self._world == self._rank
        self.values[unique[mine] // self._world] = everyone[last[mine]]

    def whole(self) -> Float[Tensor, "size width"]:
        """All slots in order, on every rank. Every rank of the world must call."""
        longest = -(-self.size // self._world)
        padded = self.values.new_zeros(longest, self.values.shape[1])
        padded[: len(self.values)] = self.values
        parts = all_gather_rows(padded, world_group()).view(self._world, longest, -1)
        return parts.transpose(0, 1).reshape(self._world * longest, -1)[: self.size]

    def take(self, whole: Float[Tensor, "size width"]) -> None:
        """This rank's slots from all of them."""
        self.values.copy_(whole[self._rank :: self._world])
