"""A program whose operations are called with fixed arguments, in memory that is made once and kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngd_optim.aten import facts, find_out_variant
from ngd_optim.program import Operation, run
from ngd_optim.replaying.plan import Plan
from ngd_optim.replaying.prepared import CannotPrepareError, Place, Prepared

_HELD = 2**18
"""Results of so many bytes on average are held for the next replay. Larger ones take long enough without that."""

_aten = torch.ops.aten
_QUICK: dict[Any, Any] = {
    _aten.mm.out: torch.mm,
    _aten.addmm.out: torch.addmm,
    _aten.bmm.out: torch.bmm,
    _aten.baddbmm.out: torch.baddbmm,
    _aten.mul.out: torch.mul,
    _aten.mul.Scalar_out: torch.mul,
    _aten.add.out: torch.add,
    _aten.neg.out: torch.neg,
    _aten.sub.out: torch.sub,
    _aten.sum.IntList_out: torch.sum,
}
"""The same by functions whose arguments torch reads in half the time."""


class FixedCalls(Prepared):
    """A program as a list of calls, each with its arguments, which are where they were.

    Args:
        plan: the program.
        v: a vector like those that will come.
        constants: what it reads beside the vector, of one recording.

    Raises:
        CannotPrepareError: it computes much, or an operation's result has no place.
    """

    def __init__(self, plan: Plan, v: Tensor, constants: Sequence[Tensor]) -> None:
        if plan.bytes > _HELD * plan.length or not plan.program:
            raise CannotPrepareError
        super().__init__(v)
        values: list[Any] = [self.vector, *[None] * (plan.size - 1), *constants]
        plan.look(values)
        layout = Layout(plan, values.copy())
        buffers = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype, device in layout.buffers
        ]
        self._calls: list[tuple[Any, list[Any], dict[str, Any]]] = []
        for operation, buffer in zip(plan.program, layout.results, strict=True):
            function: Any = operation.function
            args, kwargs, inputs = operation.filled(values)
            self.places += [
                Place(arguments, key, slot - plan.size)
                for arguments, key, slot in inputs
                if slot >= plan.size
            ]
            fact, result = facts(function), None
            if buffer is not None:
                into = _into(function)
                assert into is not None
                function, name = into
                result = kwargs[name] = buffers[buffer]
            elif torch.Tag.inplace_view in function.tags:
                # Memory of its own keeps its shape: what is written there next has that again.
                result = function(args[0].detach(), *args[1:], **kwargs)
                for index, slot in operation.outputs:
                    values[slot] = result if index is None else result[index]
                continue
            elif fact.in_place:
                function = _QUICK.get(function, function)
                result = function(*args, **kwargs)
            elif fact.shares_memory:
                result = function(*args, **kwargs)
            if fact.in_place or not fact.shares_memory:
                self._calls.append((function, args, kwargs))
            for index, slot in operation.outputs:
                values[slot] = result if index is None or result is None else result[index]
        assert plan.output is not None
        self._result: Tensor | None = values[plan.output]

    def replay(self) -> Tensor:
        """The function's value, in memory of its own."""
        result: Any = None
        for function, args, kwargs in self._calls:
            result = function(*args, **kwargs)
        return result if self._result is None else self._result.clone()


class Layout:
    """In which memory each operation of a program puts its result, where that is made once and kept.

    A buffer is used again by a later result of the same layout, as an allocator would.

    Args:
        plan: the program.
        values: of its slots: the vector, its views, and constants. The others are filled.

    Attributes:
        results: of each operation, its number in ``buffers``; None: it looks at memory or writes to
            it, or gives the function's result.
        buffers: shape, stride, dtype and device of each.

    Raises:
        CannotPrepareError: an operation's result has no place.
    """

    # Gain: 17 % of a policy's product; nothing is allocated, and nothing that
    # only looks at memory is called again.
    def __init__(self, plan: Plan, values: list[Any]) -> None:
        self.results: list[int | None] = []
        self.buffers: list[tuple[Any, ...]] = []
        memories, kinds = _run(plan, values)
        last_read: dict[int, int] = {}
        for index, operation in enumerate(plan.program):
            for slot in [*operation.slots, *_outputs_of(operation)]:
                last_read[memories[slot]] = index
        last = plan.program[-1]
        fact = facts(last.function)
        # It may give the function's result, which is made anew each time.
        if not (fact.shares_memory or fact.in_place) and last.outputs != [(None, plan.output)]:
            raise CannotPrepareError
        free: dict[Any, list[int]] = {}
        held: dict[int, int] = {}  # the buffer that stands for what the run put into a memory
        for index, operation in enumerate(plan.program):
            fact, buffer = facts(operation.function), None
            if not (fact.shares_memory or fact.in_place or operation is last):
                if [i for i, _ in operation.outputs] != [None] or not _into(operation.function):
                    raise CannotPrepareError
                (slot,) = _outputs_of(operation)
                if free.get(kinds[slot]):
                    buffer = free[kinds[slot]].pop()
                else:
                    buffer = len(self.buffers)
                    self.buffers.append(kinds[slot])
                held[memories[slot]] = buffer
            self.results.append(buffer)
            for memory in {memories[s] for s in [*operation.slots, *_outputs_of(operation)]}:
                if last_read[memory] == index and memory in held:
                    number = held.pop(memory)
                    free.setdefault(self.buffers[number], []).append(number)


def _run(plan: Plan, values: list[Any]) -> tuple[dict[int, int], dict[int, Any]]:
    """Of each slot, a number for the memory that it lies in, and how it lies there."""
    memories: dict[int, int] = {}
    kinds: dict[int, Any] = {}
    count = 0

    def look(slot: int) -> None:
        nonlocal count
        tensor = values[slot]
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise CannotPrepareError  # it need not say where it lies
        storage = tensor.untyped_storage()
        mark, number = getattr(storage, "_layout", (None, 0))
        if mark is not memories:
            number = count = count + 1
            setattr(storage, "_layout", (memories, number))  # noqa: B010
        memories[slot] = number
        kinds[slot] = tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    for slot, value in enumerate(values):
        if value is not None:
            look(slot)
    for operation, last in zip(plan.program, plan.last_uses[1], strict=True):
        run([operation], [()], values)
        for slot in _outputs_of(operation):
            look(slot)
        for slot in last:
            values[slot] = None
    return memories, kinds


def _outputs_of(operation: Operation) -> list[int]:
    return [slot for _, slot in operation.outputs]


def _into(function: Any) -> tuple[Any, str] | None:
    """What writes the result of an operation to a given tensor, and that argument's name."""
    variant = find_out_variant(function)
    if variant is None:
        return None
    return _QUICK.get(variant[0], variant[0]), variant[1]
