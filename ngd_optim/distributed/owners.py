"""Which rank has all elements of which tensors, where something is computed of whole ones."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ngd_optim.distributed.parts import Division, Part


def share_out(costs: Sequence[float], ranks: int) -> list[int]:
    """An owner for each of some things, the dearest first to the rank that has the least (Graham 1969)."""
    owner = [0] * len(costs)
    load = [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[i] = min(range(ranks), key=load.__getitem__)
        load[owner[i]] += costs[i]
    return owner


class Owners:
    """Vectors in parts, and their tensors whole at the ranks that own them: one exchange leads there, one back.

    In each of them a rank sends and receives as much as its part has.

    Args:
        division: of the vectors.
        owner: the rank that owns each of its tensors.

    Attributes:
        own: which of them are this rank's.
    """

    def __init__(self, division: Division, owner: Sequence[int]) -> None:
        self._division = division
        self._world, rank = dist.get_world_size(division.group), dist.get_rank(division.group)
        by_rank = [[i for i, one in enumerate(owner) if one == r] for r in range(self._world)]
        self._order = [i for owned in by_rank for i in owned]
        self._counts = [sum(division.lengths[i] for i in owned) for owned in by_rank]
        self.own = by_rank[rank]
        self._own_count = self._counts[rank]

    def gather(self, part: Tensor) -> dict[int, Tensor]:
        """All elements, flat, of each tensor of a vector in parts that this rank owns."""
        assert isinstance(part, Part)
        lengths, sizes = self._division.lengths, self._division.sizes
        pieces = part.local.split(lengths)
        sent = torch.cat([pieces[i] for i in self._order])
        received = sent.new_empty(self._world, self._own_count)
        each = [self._own_count] * self._world
        dist.all_to_all_single(received.view(-1), sent, each, self._counts, self._division.group)
        columns = received.split([lengths[i] for i in self.own], 1)
        return {
            i: column.reshape(-1)[: sizes[i]] for i, column in zip(self.own, columns, strict=True)
        }

    def spread(self, whole: Mapping[int, Tensor], like: Tensor) -> Part:
        """The vector in parts, like another one, whose tensors have been computed by their owners."""
        assert isinstance(like, Part)
        lengths, sizes = self._division.lengths, self._division.sizes
        columns = [
            F.pad(whole[i].reshape(-1), (0, self._world * lengths[i] - sizes[i])).view(
                self._world, lengths[i]
            )
            for i in self.own
        ]
        sent = torch.cat(columns, 1) if columns else like.local.new_empty(self._world, 0)
        received = torch.empty_like(like.local)
        each = [self._own_count] * self._world
        dist.all_to_all_single(received, sent.reshape(-1), self._counts, each, self._division.group)
        pieces = dict(
            zip(self._order, received.split([lengths[i] for i in self._order]), strict=True)
        )
        return Part.of(torch.cat([pieces[i] for i in range(len(lengths))]), self._division.group)
