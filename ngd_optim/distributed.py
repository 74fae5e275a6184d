"""Several processes that take the same steps: global averages, and decisions that all of them share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

T = TypeVar("T")


class Ranks:
    """The processes of a group, each with its own part of the data; or this process alone.

    Every average is the mean over the ranks, each of which counts the same, as in
    DistributedDataParallel. An exception on one rank is raised there and answered by a RuntimeError
    on the others, at the next thing that they do together.

    Args:
        group: a ``torch.distributed`` process group, or None.
        device: where the parameters are.
        follow_ddp: without a group, take that of the DistributedDataParallel module that runs in
            :meth:`together`.

    Attributes:
        group: the group, or None for this process alone.
    """

    def __init__(self, group: Any, device: torch.device, *, follow_ddp: bool) -> None:
        self.group = group
        self._device = device
        self._follow_ddp = (
            follow_ddp and group is None and dist.is_available() and dist.is_initialized()
        )
        self._error: Exception | None = None

    def together(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns on this rank, if it raises on none."""
        if self.group is None and not self._follow_ddp:
            return work()
        try:
            with self.noticing_ddp():
                result = work()
        except Exception as error:
            self._exchange(error)
            raise
        self._exchange(None)
        return result

    def mean_deferring_errors(self, work: Callable[[], Tensor], v: Tensor) -> Tensor:
        """The mean over the ranks of what ``work()`` returns, a tensor like ``v``; NaN if it raises on one.

        :meth:`check` raises that later: nothing here waits for the device.
        """
        try:
            total = work().clone()
        except Exception as error:
            # NaN on one rank makes all stop; the error itself is raised where the host waits
            # anyway.
            self._error = self._error or error
            total = torch.full_like(v, torch.nan)
        dist.all_reduce(total, group=self.group)
        return total.div_(dist.get_world_size(self.group))

    def check(self) -> None:
        """Raise what :meth:`mean_deferring_errors` met on a rank."""
        error, self._error = self._error, None
        self._exchange(error)
        if error is not None:
            raise error

    def average(self, value: Tensor) -> Tensor:
        """The mean over the ranks, in float32 at least."""
        if self.group is None:
            return value
        total = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=self.group)
        return (total / dist.get_world_size(self.group)).to(value.dtype)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on some rank."""
        if self.group is None:
            return list(flags)
        return [bool(value) for value in self._maximum([int(flag) for flag in flags])]

    def all(self, flag: bool) -> bool:
        """Whether a flag is set on every rank."""
        return not self.any([not flag])[0]

    def agree(self, number: int) -> bool:
        """Whether every rank gives the same number."""
        if self.group is None:
            return True
        # All equal: the maximum is the minimum.
        highest, lowest = self._maximum([number, -number])
        return highest == -lowest

    def require_equal(self, v: Tensor) -> None:
        """Compare the parameters between the ranks.

        Raises:
            ValueError: they differ.
        """
        if self.group is None:
            return
        lowest, highest = v.detach().clone(), v.detach().clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self.group)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        if not torch.allclose(lowest, highest, rtol=0, atol=0, equal_nan=True):
            raise ValueError(
                "the parameters differ between the ranks of the process group; start from the "
                "same ones: torch.nn.parallel.DistributedDataParallel sends rank 0's to all"
            )

    def _maximum(self, values: list[int]) -> list[int]:
        tensor = torch.tensor(values, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def _exchange(self, error: Exception | None) -> None:
        """Tell the other ranks of an error, or be told of one."""
        if self.group is not None:
            (failed,) = self._maximum([0 if error is None else 1 + dist.get_rank(self.group)])
            if failed and error is None:
                raise RuntimeError(
                    f"rank {failed - 1} raised an exception in this step, so this rank did not "
                    "move either"
                )

    @contextmanager
    def noticing_ddp(self, running: nn.Module | None = None) -> Iterator[None]:
        """Take the group of a DistributedDataParallel module that runs in the block, or is ``running`` already."""
        if not self._follow_ddp or self.group is not None:
            yield
            return

        def notice(module: nn.parallel.DistributedDataParallel) -> None:
            self.group = module.process_group

        if isinstance(running, nn.parallel.DistributedDataParallel):
            notice(running)
        with _before_ddp_modules(notice):
            yield


def is_one_of_several() -> bool:
    """Whether ``torch.distributed`` runs this process beside others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


ALONE = Ranks(None, torch.device("cpu"), follow_ddp=False)


@contextmanager
def quiet_ddp(*, broadcast: bool) -> Iterator[None]:
    """Let DistributedDataParallel modules run the model and nothing else.

    NaturalCG averages the gradients itself, and what the modules prepare for that cannot be done
    inside torch.func.

    Args:
        broadcast: send rank 0's buffers to all ranks, where the modules would.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    found: dict[nn.parallel.DistributedDataParallel, tuple[bool, bool]] = {}

    def silence(module: nn.parallel.DistributedDataParallel) -> None:
        if module.static_graph:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) counts on backward passes that "
                "NaturalCG does not run; use static_graph=False"
            )
        found.setdefault(
            module, (module.require_backward_grad_sync, module.require_forward_param_sync)
        )
        module.require_backward_grad_sync = False
        module.require_forward_param_sync &= broadcast

    try:
        with _before_ddp_modules(silence):
            yield
    finally:
        for module, flags in found.items():
            module.require_backward_grad_sync, module.require_forward_param_sync = flags


@contextmanager
def _before_ddp_modules(
    action: Callable[[nn.parallel.DistributedDataParallel], None],
) -> Iterator[None]:
    here = get_ident()  # the hook sees the modules of all threads

    def hook(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel) and get_ident() == here:
            action(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
