"""Several processes that take the same steps: global averages, and decisions that all of them share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ngd_optim.distributed.ddp import before_ddp_modules, find_ddp_group
from ngd_optim.distributed.owners import Owners, share_out
from ngd_optim.distributed.parts import Division, ParametersInParts, Part
from ngd_optim.distributed.sharded import ShardedModules
from ngd_optim.parameters import FlatParameters
from ngd_optim.real_parts import real_parts

T = TypeVar("T")


class Common(NamedTuple):
    """Something that all ranks must have in common when a step begins.

    Attributes:
        number: the same where it is the same; 0-dim if it is a tensor.
        sentence: what is said where it is not.
    """

    number: int | Tensor
    sentence: str


class Ranks:
    """The processes of a group in one step, each with its own part of the data; or this process alone.

    Every average is the mean over the ranks, each of which counts the same, as in
    DistributedDataParallel. An exception on one rank is raised there and answered by a RuntimeError
    on the others, at the next thing that they do together. As a context manager it has the others
    told also of what is raised before the first such thing.

    Args:
        group: a ``torch.distributed`` process group, or None.
        device: where the parameters are.
        follow_ddp: without a group, take that of the DistributedDataParallel module that runs in
            :meth:`together`.
        parameters: by which such a module is found if an exception is raised before it runs.

    Attributes:
        group: the group, or None for this process alone.
        division: of the step's vectors over the ranks; None: each rank has them whole.
    """

    def __init__(
        self,
        group: Any,
        device: torch.device,
        *,
        follow_ddp: bool,
        parameters: Sequence[Tensor] = (),
    ) -> None:
        self.group = group
        self._device = device
        self._follow_ddp = (
            follow_ddp and group is None and dist.is_available() and dist.is_initialized()
        )
        self._parameters = parameters
        self.division: Division | None = None
        self._error: BaseException | None = None
        self._common: Callable[[], Sequence[Common]] = tuple
        self._length = 0

    @staticmethod
    def is_one_of_several() -> bool:
        """Whether ``torch.distributed`` runs this process beside others."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @staticmethod
    def group_of(parameters: Sequence[Tensor]) -> Any:
        """That of the modules of ``fully_shard`` or DistributedDataParallel with these parameters; None: one process.

        Raises:
            ValueError: there are several processes, and no such module.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return None
        found = ShardedModules(parameters).group or find_ddp_group(parameters)
        if found is None and Ranks.is_one_of_several():
            raise ValueError(
                "shard_state=True needs to know the processes before the closure runs, and these parameters "
                "are in no module of DistributedDataParallel or fully_shard; give "
                "process_group=torch.distributed.group.WORLD"
            )
        return found

    def begin_with(self, length: int, common: Callable[[], Sequence[Common]] = tuple) -> None:
        """Compare what ``common()`` gives, of this length, when the ranks first meet, at no exchange of its own.

        That raises ValueError on all ranks.
        """
        self._length, self._common = length, common

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if (
            error is not None and self._length
        ):  # the others are still to come to their first exchange
            self._tell(error)

    def together(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns on this rank, if it raises on none."""
        if self.group is None and not self._follow_ddp:
            return work()
        try:
            with self.noticing_ddp():
                result = work()
        except BaseException as error:
            self._tell(error)
            raise
        self._exchange(None)
        return result

    def together_with_flags(
        self, work: Callable[[], T], flags: Callable[[T], Sequence[bool]], length: int
    ) -> tuple[T, list[bool]]:
        """The same, and for each of so many flags of it whether it is set on some rank: one exchange for both."""
        try:
            result = work()
        except BaseException as error:
            self._tell(error, [False] * length)
            raise
        return result, self._exchange(None, flags(result))

    def mean_deferring_errors(self, work: Callable[[], Tensor], v: Tensor) -> Tensor:
        """The mean over the ranks of what ``work()`` returns, a tensor like ``v``; NaN if it raises on one.

        :meth:`check` raises that later: nothing here waits for the device.
        """
        result = self.deferring_errors(work)
        # NaN on one rank makes all stop; the error itself is raised where the host waits anyway.
        is_lost = result is None or self._error is not None
        own = torch.full_like(v, torch.nan) if is_lost else result
        assert own is not None
        if self.division is not None:
            return self.division.mean(own)
        total = own.clone()
        dist.all_reduce(total, group=self.group)
        return total.div_(dist.get_world_size(self.group))

    def deferring_errors(self, work: Callable[[], T]) -> T | None:
        """What ``work()`` returns; None if it raises. Means are then NaN, until :meth:`check` raises that."""
        if self.group is None:
            return work()
        try:
            return work()
        except BaseException as error:
            self._error = self._error or error
            return None

    def check(self) -> None:
        """Raise what :meth:`deferring_errors` met on a rank."""
        error, self._error = self._error, None
        if error is not None:
            self._tell(error)
            raise error
        self._exchange(None)

    def average(self, value: Tensor) -> Tensor:
        """The mean over the ranks, in float32 at least."""
        if self.group is None:
            return value
        total = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=self.group)
        return (total / dist.get_world_size(self.group)).to(value.dtype)

    def divide(self, parameters: FlatParameters) -> ParametersInParts:
        """Have vectors of the step, from now on, in parts; and the parameters as such a vector."""
        self.division = Division(parameters.params, self.group)
        return ParametersInParts(parameters, self.division)

    @property
    def rank(self) -> int:
        """This one."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @staticmethod
    def share_out(costs: Sequence[float], ranks: int) -> list[int]:
        """See :func:`~ngd_optim.distributed.owners.share_out`."""
        return share_out(costs, ranks)

    def owners(self, owner: Sequence[int]) -> Owners:
        """Of the parameters in vectors of the step, which are in parts."""
        assert self.division is not None
        return Owners(self.division, owner)

    def gather_at_owners(
        self, tensors: Sequence[Tensor], owner: Sequence[int], like: Tensor
    ) -> dict[int, Tensor]:
        """By index all elements, flat and of the kind of ``like``, of those tensors in rows that this rank owns."""
        division = self._division_of(tensors)
        return Owners(division, owner).gather(division.from_tensors(tensors, like))

    def from_rank(self, tensor: Tensor, rank: int) -> Tensor:
        """What a rank has, in the memory that each rank gives."""
        dist.broadcast(tensor, dist.get_global_rank(self.group, rank), group=self.group)
        return tensor

    def mean_in_rows(self, tensor: Tensor, older: Tensor | None, share: float) -> Tensor:
        """The mean over the ranks of a tensor, in rows over them, with a share of an older one of its shape."""
        division = self._division_of([tensor])
        flat = real_parts(tensor).reshape(-1)
        mean = division.mean(flat)
        if older is not None and older.shape == tensor.shape:
            mean.lerp_(division.from_tensors([older], flat), share)
        return division.to_rows(mean)[0]

    def _division_of(self, tensors: Sequence[Tensor]) -> Division:
        assert self.division is not None
        return Division(tensors, self.group, self.division.mesh)

    def mean(self, flat: Tensor) -> Tensor:
        """The mean over the ranks of a vector that is whole on each, as the step's vectors lie."""
        return self.average(flat) if self.division is None else self.division.mean(flat)

    def whole(self, v: Tensor) -> Tensor:
        """All elements of a vector of the step, on each rank."""
        return self.division.whole(v) if self.division and isinstance(v, Part) else v

    def own(self, flat: Tensor) -> Tensor:
        """What this rank has, in a vector of the step, of one that is whole on each rank."""
        return flat if self.division is None else self.division.part(flat)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on some rank."""
        return list(flags) if self.group is None else [bool(v) for v in self._meet(flags, [])[0]]

    def all(self, flag: bool, common: Sequence[Common] = ()) -> bool:
        """Whether a flag is set on every rank.

        Raises:
            ValueError: the ranks have not in common what they must.
        """
        if self.group is None:
            return flag
        (missing,), agreed = self._meet([not flag], [entry.number for entry in common])
        _require(common, agreed)
        return not missing

    def agree(self, number: int) -> bool:
        """Whether every rank gives the same number."""
        return self.group is None or self._meet([], [number])[1][0]

    def _meet(
        self, values: Sequence[int], numbers: Sequence[int | Tensor]
    ) -> tuple[list[int], list[bool]]:
        """The ranks' maxima of some values, and for each number whether it is the same on all ranks."""
        # ~x falls where x rises, without overflow: all are equal where the maximum is the minimum.
        parts = [*values, *numbers, *(~number for number in numbers)]
        tensor = torch.stack(
            [torch.as_tensor(x, dtype=torch.int64, device=self._device) for x in parts]
        )
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        found, n = tensor.tolist(), len(values)
        highest, lowest = found[n : n + len(numbers)], found[n + len(numbers) :]
        return found[:n], [x == ~y for x, y in zip(highest, lowest, strict=True)]

    def _tell(self, error: BaseException, flags: Sequence[bool] = ()) -> None:
        """Tell the other ranks of an error; it is to be raised, and not what may be raised here."""
        if self.group is None and self._follow_ddp:  # raised before the module ran
            self.group = find_ddp_group(self._parameters)
        with suppress(Exception):
            self._exchange(error, flags)

    def _exchange(self, error: BaseException | None, flags: Sequence[bool] = ()) -> list[bool]:
        """Tell the other ranks of an error, or be told of one; the first time, compare what must be common.

        For each flag it returns whether it is set on some rank.
        """
        if self.group is None:
            return list(flags)
        failed = 0 if error is None else 1 + dist.get_rank(self.group)
        n, self._length = self._length, 0
        common = self._common() if n and not failed else ()
        self._common = tuple  # it may hold vectors
        numbers = [entry.number for entry in common] or [0] * n
        (failed, *found), agreed = self._meet([failed, *flags], numbers)
        if error is not None:
            return []
        if failed:
            raise RuntimeError(
                f"rank {failed - 1} raised an exception in this step, so this rank did not move either"
            )
        _require(common, agreed)
        return list(map(bool, found))

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
        with before_ddp_modules(notice):
            yield


ALONE = Ranks(None, torch.device("cpu"), follow_ddp=False)


def _require(common: Sequence[Common], agreed: Sequence[bool]) -> None:
    for entry, is_same in zip(common, agreed, strict=True):
        if not is_same:
            raise ValueError(entry.sentence)
