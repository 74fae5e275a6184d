"""Renew the constants of a recorded function at other parameters, and on other data, without recording it anew.

What a product reads beside its vector lies in memory that the closure's run has filled, such as the
activations, or was computed from that. Two runs that do the same operations on tensors of the same
shapes have the same product, up to what is in that memory. So a recording also notes how its
constants come from the run, and takes them from a later one.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ngd_optim.aten import Facts, find_written, tensors_of
from ngd_optim.program import (
    Operation,
    find_last_uses,
    remove_dead_code,
    run,
    take_slots_out,
)
from ngd_optim.recording.trace import Source, Trace, is_plain

_aten = torch.ops.aten
_ZEROS = {
    _aten.zeros.default,
    _aten.zeros_like.default,
    _aten.new_zeros.default,
    _aten._efficientzerotensor.default,
}


class Renewal:
    """``run ↦ constants`` of a recorded function.

    Args:
        program: computes them.
        size: how many slots that has.
        sources: the slots that a run fills.
        results: the slots of the constants.
        zeros: those of constants that were zero, and have to be.
    """

    def __init__(
        self,
        program: list[Operation],
        size: int,
        sources: dict[int, Source],
        results: list[int],
        zeros: list[int],
    ) -> None:
        self._program = program
        self._sources = sources
        self._results = results
        self._zeros = zeros
        self._size = size
        self._last_uses = find_last_uses(program, {*results, *zeros})

    @torch.no_grad()
    def __call__(self, trace: Trace) -> list[Tensor] | None:
        """The constants; None if something of the run is gone, or no longer zero."""
        values: list[Any] = [None] * self._size
        for slot, source in self._sources.items():
            values[slot] = trace.get(source)
            if values[slot] is None:
                return None
        run(self._program, self._last_uses, values)
        if any(values[slot].any() for slot in self._zeros):
            return None
        return [values[slot] for slot in self._results]


class Origins:
    """Notes what is computed beside a vector, from the memory of a run.

    Args:
        trace: of that run.

    Attributes:
        problem: why constants cannot be followed to it; None if they can.
    """

    def __init__(self, trace: Trace) -> None:
        self.problem: str | None = None
        self._trace = trace
        self._mark = object()
        self._program: list[Operation] = []
        self._memories: list[int] = []
        self._sources: dict[Source, int] = {}
        self._zeros: set[int] = set()  # memories that nothing but zeros was written to
        self._found: dict[tuple[int, Any], int] = {}
        self._kinds: dict[int, Any] = {}

    def note(self, func: Any, fact: Facts, args: Any, kwargs: Any, result: Any) -> None:
        """An operation that does not depend on the vector."""
        # Views are found by where they lie, when something reads them.
        if self.problem is not None or (fact.shares_memory and not fact.in_place):
            return
        if not fact.replayable:
            self._fail(f"{func} reads values, or draws random numbers")
            return
        written = find_written(fact, args, kwargs) if fact.written else []
        if any(self._own(tensor) is None for tensor in written) or (
            fact.in_place and fact.shares_memory
        ):
            self._fail(f"{func} writes to memory from elsewhere")
            return
        inputs: list[tuple[Any, Any, int]] = []
        own_args = take_slots_out(list(args), inputs, self._slot_of)
        own_kwargs = take_slots_out(dict(kwargs), inputs, self._slot_of) if kwargs else {}
        outputs: list[tuple[int | None, int]] = []
        for index, tensor in tensors_of(result):
            if any(tensor is t for t in written):
                continue
            if self._own(tensor) is None and self._trace.find(tensor) is None:
                outputs.append((index, self._new_memory(tensor)))
                if func in _ZEROS:
                    self._zeros.add(outputs[-1][1])
        self._zeros.difference_update(
            self._memories[base] for t in written if (base := self._own(t)) is not None
        )
        if outputs or written:
            self._program.append(Operation(func, own_args, own_kwargs, inputs, outputs))

    def finish(self, constants: Iterable[Tensor], zeros: Iterable[Tensor]) -> Renewal | None:
        """How constants are renewed, and which are only taken for zeros; None: there is a problem."""
        results = [self._slot_of(t) for t in constants]
        assumed = [
            slot
            for t in zeros
            if (slot := self._slot_of(t)) is not None and self._memories[slot] not in self._zeros
        ]
        if self.problem is not None:
            return None
        wanted = [slot for slot in results if slot is not None]
        kept = remove_dead_code(self._program, [*wanted, *assumed], self._memories.__getitem__)
        needed = {*wanted, *assumed, *(slot for operation in kept for slot in operation.slots)}
        sources = {slot: source for source, slot in self._sources.items() if slot in needed}
        return Renewal(kept, len(self._memories), sources, wanted, assumed)

    def _slot_of(self, tensor: Tensor) -> int | None:
        if not is_plain(tensor):
            self._fail(f"a constant is a {type(tensor).__name__}")
            return None
        base = self._own(tensor)
        place = tensor.shape, tensor.stride(), int(tensor.storage_offset())
        if base is not None:
            key = base, (*place, _kind_of(tensor))
            slot = self._found.get(key)
            if slot is None and self._is_plain_view(tensor, base):
                args = [None, *place]
                slot = self._found[key] = self._new_slot(self._memories[base])
                self._program.append(
                    Operation(_aten.as_strided.default, args, {}, [(args, 0, base)], [(None, slot)])
                )
            return slot
        source = self._trace.find(tensor)
        if source is None:
            self._fail("a constant does not come from the closure's run")
            return None
        if source not in self._sources:
            self._sources[source] = self._new_slot(None)
        return self._sources[source]

    def _is_plain_view(self, tensor: Tensor, base: int) -> bool:
        if _kind_of(tensor) == self._kinds[base]:
            return True
        self._fail("a constant is looked at as another dtype")
        return False

    def _own(self, tensor: Tensor) -> int | None:
        """The first slot in memory that was made while the function ran; None: it was there before."""
        mark, slot = getattr(tensor.untyped_storage(), "_origin", (None, None))
        return slot if mark is self._mark else None

    def _new_memory(self, tensor: Tensor) -> int:
        slot = self._new_slot(None)
        setattr(tensor.untyped_storage(), "_origin", (self._mark, slot))  # noqa: B010
        place = tensor.shape, tensor.stride(), int(tensor.storage_offset())
        self._kinds[slot] = _kind_of(tensor)
        self._found[slot, (*place, self._kinds[slot])] = slot
        return slot

    def _new_slot(self, memory: int | None) -> int:
        self._memories.append(len(self._memories) if memory is None else memory)
        return len(self._memories) - 1

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or problem


def _kind_of(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()
