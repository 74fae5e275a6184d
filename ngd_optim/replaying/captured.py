"""A program in a CUDA graph."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ngd_optim.replaying.plan import Plan
from ngd_optim.replaying.prepared import CannotPrepareError, Prepared


class CapturedCalls(Prepared):
    """A program in a CUDA graph: one launch for all of its operations.

    A graph reads and writes the memory that it was captured with. So the constants are copied there,
    once for each recording that comes, and the result is copied from there.

    Args:
        plan: the program.
        v: a vector like those that will come.
        constants: what it reads beside the vector, of one recording.

    Raises:
        CannotPrepareError: the program, or the device, cannot be captured.
    """

    is_costly = True

    def __init__(self, plan: Plan, v: Tensor, constants: Sequence[Tensor]) -> None:
        super().__init__(v)
        if not _is_cuda(v):
            raise CannotPrepareError(
                f"cuda_graphs is for devices of CUDA, and this one is {v.device}"
            )
        self._constants = [constant.clone() for constant in constants]
        values: list[Any] = [self.vector, *[None] * (plan.size - 1), *self._constants]
        plan.look(values)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, pool=_share_pool()):
                self._result: Tensor = plan.run(values)
        except RuntimeError as error:
            raise CannotPrepareError(str(error).strip().splitlines()[0]) from error

    def take(self, constants: Sequence[Tensor]) -> None:
        """Copy these constants to where the graph reads them."""
        for own, constant in zip(self._constants, constants, strict=True):
            own.copy_(constant)

    def replay(self) -> Tensor:
        """What the program gives for the vector and the constants that are there, a new tensor."""
        self._graph.replay()
        return self._result.clone()


def _is_cuda(v: Tensor) -> bool:
    return v.is_cuda


@cache
def _share_pool() -> Any:
    """Memory for what graphs compute on the way: no result is left there when the next one is replayed."""
    return torch.cuda.graph_pool_handle()
