"""How a tensor lies over the ranks of a mesh: whole on each of them, or in parts, as a ``DTensor``.

Vectors of a step are made of whole tensors. This is the one place that turns them into what a
parameter, its gradient and its state are on this rank, and back.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_spread(tensor: Any) -> bool:
    """Whether it is a ``DTensor``; their module, which takes half a second to import, is not asked for."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of it, with the same memory."""
    return tensor.to_local() if is_spread(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: Tensor) -> Tensor:
    """All of it; of parts, by a collective of all ranks."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def spread_like(like: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor as another one lies; its parts are copies, so that the whole can be freed."""
    if not is_spread(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    lying: Any = like
    everywhere = [Replicate()] * lying.device_mesh.ndim
    given = DTensor.from_local(tensor, lying.device_mesh, everywhere, run_check=False)
    part = given.redistribute(placements=lying.placements).to_local()
    return spread_part_like(like, part.clone(memory_format=torch.contiguous_format))


def zeros_spread_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros with the memory of one."""
    shape = local_part(like).shape
    return spread_part_like(like, torch.zeros((), dtype=dtype, device=like.device).expand(shape))


def spread_rows(shape: Sequence[int], part: Tensor, mesh: Any) -> Tensor:
    """A tensor of this shape of which each rank of a mesh has as many rows, by those that this rank has."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(
        part.view(-1 if math.prod(shape[1:]) else 0, *shape[1:]),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size(shape),
        stride=_strides(shape),
    )


def zeros_in_rows(shape: Sequence[int], dtype: torch.dtype, mesh: Any) -> Tensor:
    """The same of zeros, with the memory of one."""
    world, rank = mesh.size(), mesh.get_local_rank()
    each = -(-shape[0] // world)
    rows = max(0, min(each, shape[0] - rank * each))
    zero = torch.zeros((), dtype=dtype, device=mesh.device_type)
    return spread_rows(shape, zero.expand(rows, *shape[1:]), mesh)


def mesh_of(group: Any, device: torch.device) -> Any:
    """The ranks of a process group, as a mesh over which tensors can be spread."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, device.type)


def is_of_this_rank(tensor: Any) -> bool:
    """Whether it has the part of this rank; one that ``torch.load`` has read has that of the rank that saved it."""
    if not is_spread(tensor) or tensor.device_mesh.get_coordinate() is None:
        return True
    place = tensor.device_mesh.mesh[tuple(tensor.device_mesh.get_coordinate())]
    return not torch.distributed.is_initialized() or int(place) == torch.distributed.get_rank()


def spread_part_like(like: Tensor, part: Tensor) -> Tensor:
    """What this rank has, of any shape, as a part of a tensor that lies as another one does."""
    if not is_spread(like):
        return part
    from torch.distributed.tensor import DTensor

    lying: Any = like
    return DTensor.from_local(
        part.view(lying.to_local().shape),
        lying.device_mesh,
        lying.placements,
        run_check=False,
        shape=like.shape,
        stride=_strides(like.shape),
    )


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())
