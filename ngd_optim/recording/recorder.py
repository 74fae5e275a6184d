"""Record what a linear map does to a vector, once, and replay it on others.

Only a part of a curvature product depends on the vector. The rest, the primal pass above all, is
the same for every product at a point. The recording keeps the aten operations that depend on the
vector; everything else is a constant.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngd_optim.aten import facts, find_written, tensors_of
from ngd_optim.recording.forward import ForwardRecorder
from ngd_optim.recording.program import CannotReplayError, Meta, Operation, take_slots_out
from ngd_optim.recording.renewal import Origins, Renewal, Trace
from ngd_optim.recording.replay import Plan, Recording
from ngd_optim.torch_internals import DispatchMode

logger = logging.getLogger("ngd_optim")

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

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Note it."""
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


_MOST_KEPT = 4
"""So many recordings are kept, and so many made in vain before no more are."""


class KeptRecordings:
    """Recorded products of a closure, from earlier steps, without what they read.

    A step whose closure does what it did before takes from its own run what the product reads, and
    records nothing. That was seen to be right once: where a product was recorded for the second time,
    what the first recording would have taken was bit for bit what the second one read.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._left = _MOST_KEPT
        self._steps = 0

    def form(
        self,
        recorder: ForwardRecorder,
        about: Any,
        make: Callable[[], Function],
        v: Tensor,
        *,
        captures: bool = False,
    ) -> tuple[Tensor, Recording]:
        """The product with ``v``, and the recording, renewed or made.

        Args:
            recorder: has seen the closure's run in this step.
            about: what tells, beside the operations of the run, which product it is: tensors, numbers
                and objects that hold them; None: that is not known.
            make: gives the product itself.
            v: a vector.
            captures: see :class:`Recording`.
        """
        self._steps += 1
        # Of what is seen once, nothing need be kept.
        follows = about is not None and self._left and self._steps > 1
        trace = recorder.trace(about) if follows else None
        kept = None
        if trace is not None:
            kept = next((k for k in self._kept if k.signature == trace.signature), None)
        if trace is not None and kept is not None and kept.is_right:
            renewed = kept.renew(trace, captures=captures)
            if renewed is not None:
                return renewed(v), renewed
        # What makes the product is a part of what renews it.
        function = make() if trace is None else lambda u: make()(u)
        image, recording, renewal = record_from(trace, function, v.contiguous())
        recording = Recording(recording.plan, recording.constants, captures=captures)
        if trace is not None:
            self._learn(kept, trace, recording, renewal)
        # A replay rounds otherwise than what it was recorded from, and a run that is resumed records
        # where the one that went on does not.
        return image if about is None else recording(v), recording

    def _learn(
        self, kept: "_Kept | None", trace: Trace, recording: Recording, renewal: Renewal | None
    ) -> None:
        if kept is not None and not kept.is_right:
            kept.is_right = kept.agrees(trace, recording)
            if kept.is_right:
                self._left = _MOST_KEPT
                return
        if kept is not None:  # it was not right, or is so no longer
            self._kept.remove(kept)
        self._left -= 1
        if renewal is None or not self._left:
            self._left, self._kept = 0, []
            logger.debug("products are recorded anew at each step")
            return
        new = _Kept(trace.signature, recording.plan, renewal)
        self._kept = [*self._kept[1 - _MOST_KEPT :], new]


@dataclass
class _Kept:
    """One of them, and whether it was compared with another."""

    signature: Any
    plan: Plan
    renewal: Renewal
    is_right: bool = False

    def renew(self, trace: Trace, *, captures: bool = False) -> Recording | None:
        """The product of another run; None: it cannot be had."""
        constants = self.renewal(trace)
        return None if constants is None else Recording(self.plan, constants, captures=captures)

    def agrees(self, trace: Trace, recording: Recording) -> bool:
        """Whether renewing gives, bit for bit, what was recorded of the same run."""
        renewed = self.renew(trace)
        return (
            renewed is not None
            and self.plan.computes_like(recording.plan)
            and all(map(torch.equal, renewed.constants, recording.constants))
        )
