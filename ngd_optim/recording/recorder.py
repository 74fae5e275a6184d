"""Record what a linear map does to a vector, once, and replay it on others.

Only a part of a curvature product depends on the vector. The rest, the primal pass above all, is
the same for every product at a point. The recording keeps the aten operations that depend on the
vector; everything else is a constant.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ngd_optim.aten import facts, find_written, tensors_of
from ngd_optim.program import CannotReplayError, Meta, Operation, take_slots_out
from ngd_optim.recording.renewal import Origins, Renewal
from ngd_optim.recording.trace import Trace
from ngd_optim.replaying import Plan, Recording
from ngd_optim.torch_internals import DispatchMode, materialize

Function = Callable[[Tensor], Tensor]

_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


def record(function: Function, v: Tensor, *, optimises: bool = True) -> tuple[Tensor, Recording]:
    """``function(v)``, and what replays the function on other vectors.

    Args:
        function: linear; everything that it uses beside the vector must stay as it is while the
            recording is used.
        v: the vector that it is recorded on.
        optimises: make the program shorter; else :meth:`Recording.multiply` can replay it.

    Raises:
        CannotReplayError: an operation on the vector is random, writes to other memory or reads the
            vector's values.
    """
    result, recording, _ = record_from(None, function, v, optimises=optimises)
    return result, recording


def record_from(
    trace: Trace | None, function: Function, v: Tensor, *, optimises: bool = True
) -> tuple[Tensor, Recording, Renewal | None]:
    """The same, and what renews the recording.

    Args:
        trace: the run of a closure that the function comes from; None: it cannot be renewed.
        function: as in :func:`record`.
        v: likewise.
        optimises: likewise.
    """
    v = v.detach()
    origins = None if trace is None else Origins(trace)
    recorder = Recorder(v, origins)
    with torch.no_grad(), recorder:
        result = function(v)
    constants: list[Tensor] = []
    zeros: list[Tensor] = []
    output = recorder.slot_of(result)
    plan = Plan(
        recorder.program,
        recorder.metas,
        output,
        result,
        constants,
        zeros,
        optimises=optimises,
    )
    renewal = None if origins is None else origins.finish(constants, zeros)
    return result, Recording(plan, constants), renewal


class Recorder(DispatchMode):
    """Notes the operations that depend on one tensor. Every tensor that does has a numbered slot.

    It holds none of them: they are freed as they would be without a recording. What it notes of
    tensors and storages are attributes of theirs, because dictionaries of weak references take
    longer than the operations.

    Args:
        v: that tensor.
        origins: is told of the other operations.
    """

    def __init__(self, v: Tensor, origins: Origins | None = None) -> None:
        super().__init__()
        self._origins = origins
        self._mark = object()
        self._memories = 0
        self.program: list[Operation] = []
        self.metas: list[Meta] = []
        self._new_slot(v)

    def slot_of(self, tensor: Tensor) -> int | None:
        """The slot of a tensor, None if it does not depend on the vector."""
        return self._read_mark(tensor, "_slot")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        func = materialize(func)
        fact = facts(func)
        if fact.asks_about_shapes:
            return func(*args, **kwargs)
        inputs: list[tuple[Any, Any, int]] = []
        own_args = take_slots_out(list(args), inputs, self.slot_of)
        own_kwargs = take_slots_out(dict(kwargs), inputs, self.slot_of) if kwargs else {}
        # It does not depend on the vector: its result is a constant of the program.
        if not inputs:
            result = func(*args, **kwargs)
            if self._origins is not None:
                self._origins.note(func, fact, args, kwargs, result)
            return result
        # Autograd detaches what it saves; the alias is the same value, hence the same slot.
        if func in _ALIASES:
            result = func(*args, **kwargs)
            self._put_mark(result, "_slot", inputs[0][2])
            return result
        # An index or a mask may be constant where the indexed tensor is not: that is replayable.
        if not fact.replayable and not (
            fact.by_constants and all(p is own_args and key == 0 for p, key, _ in inputs)
        ):
            raise CannotReplayError(f"{func} is random, or reads values that depend on the vector")
        # Memory from elsewhere would keep what the last replay wrote there.
        if fact.in_place and any(self._memory(t) is None for t in find_written(fact, args, kwargs)):
            raise CannotReplayError(
                f"{func} writes what depends on the vector to memory from elsewhere"
            )
        result = func(*args, **kwargs)
        # squeeze_ and the like give the same tensor another shape: another slot from here on.
        anew = fact.in_place and fact.shares_memory
        slots = [(index, self._new_slot(tensor, anew=anew)) for index, tensor in tensors_of(result)]
        self.program.append(Operation(func, own_args, own_kwargs, inputs, slots))
        return result

    def _new_slot(self, tensor: Tensor, *, anew: bool = False) -> int:
        slot = self.slot_of(tensor)
        if slot is not None and not anew:
            return slot
        # Views share storage: a write through one of them changes the others.
        memory = self._memory(tensor)
        if memory is None:
            memory = self._memories
            self._memories += 1
            self._put_mark(tensor.untyped_storage(), "_memory", memory)
        flags = (tensor.is_conj(), tensor.is_neg())
        offset = int(tensor.storage_offset())
        self.metas.append(Meta(tensor.shape, tensor.stride(), tensor.dtype, flags, offset, memory))
        self._put_mark(tensor, "_slot", len(self.metas) - 1)
        return len(self.metas) - 1

    def _memory(self, tensor: Tensor) -> int | None:
        """A number for each piece of memory that depends on the vector, None for others."""
        return self._read_mark(tensor.untyped_storage(), "_memory")

    def _put_mark(self, thing: Tensor | torch.UntypedStorage, name: str, number: int) -> None:
        setattr(thing, name, (self._mark, number))

    def _read_mark(self, thing: Tensor | torch.UntypedStorage, name: str) -> int | None:
        mark, number = getattr(thing, name, (None, None))
        return number if mark is self._mark else None
