"""How a tensor lies over the ranks of a mesh: whole on each of them, or in parts, as a ``DTensor``.

Vectors of a step are made of whole tensors. This is the one place that turns them into what a
parameter, its gradient and its state are on this rank, and back.
"""

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
