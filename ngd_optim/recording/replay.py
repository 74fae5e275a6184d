"""A recorded function, and its replay on other vectors."""

import logging
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ngd_optim.aten import facts, find_out_variant
from ngd_optim.recording.passes import optimise
from ngd_optim.recording.program import Meta, Operation, find_last_uses, remove_dead_code, run

logger = logging.getLogger("ngd_optim")

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


class Plan:
    """A recorded program without its constants.

    Args:
        program: what was recorded.
        metas: of its slots.
        output: the slot of what the function gave; None if it does not depend on the vector.
        result: what it gave.
        constants: is filled with what the program reads beside the vector.
        zeros: is filled with what it would read, if that were not zero.
        optimises: make the program shorter; it then writes where it knows the layout.

    Attributes:
        length: how many operations a replay takes.
        bytes: how much they compute.
        layout: where they put it, if they are called again and again; None until then.
        captured: the program in a CUDA graph, if it was asked for; None until then, or if it cannot be.
        can_capture: whether it was not in vain to ask.
    """

    def __init__(
        self,
        program: list[Operation],
        metas: list[Meta],
        output: int | None,
        result: Tensor,
        constants: list[Tensor],
        zeros: list[Tensor],
        *,
        optimises: bool = True,
    ) -> None:
        self.output = output
        self.views: list[Operation] = []
        self.program: list[Operation] = []
        self.zero = torch.zeros_like(result.as_subclass(Tensor)) if output is None else None
        if output is not None and optimises:
            self.views, self.program = optimise(program, metas, output, zeros)
        elif output is not None:
            self.program = remove_dead_code(program, [output], lambda slot: metas[slot].memory)
        self.size = len(metas)
        self.layout: Layout | None = None
        self.captured: CapturedCalls | None = None
        self.can_capture = bool(self.program)
        everything = [*self.views, *self.program]
        _take_constants_out(everything, self.size, constants)
        last_uses = find_last_uses(everything, () if output is None else (output,), self.size)
        self.last_uses = last_uses[: len(self.views)], last_uses[len(self.views) :]
        self.length = len(self.program)
        computed = [op for op in self.program if not facts(op.function).shares_memory]
        self.bytes = sum(metas[slot].bytes for op in computed for _, slot in op.outputs)

    def computes_like(self, other: "Plan") -> bool:
        """Whether it is the same program, up to its constants."""

        def described(plan: Plan) -> Any:
            operations = [*plan.views, *plan.program]
            return plan.output, [
                (op.function, op.args, op.kwargs, op.slots, op.outputs) for op in operations
            ]

        return described(self) == described(other)


def _take_constants_out(program: list[Operation], first: int, constants: list[Tensor]) -> None:
    """Let the operations read constants from slots, of which ``first`` is the first one."""
    slots: dict[int, int] = {}
    for operation in program:
        places: list[Any] = [operation.args, operation.kwargs]
        places += [value for value in operation.args if isinstance(value, list)]
        for place in places:
            for key, value in place.items() if isinstance(place, dict) else enumerate(place):
                if isinstance(value, Tensor):
                    if id(value) not in slots:
                        slots[id(value)] = first + len(constants)
                        constants.append(value)
                    operation.inputs = [*operation.inputs, (place, key, slots[id(value)])]
                    place[key] = None


class Recording:
    """``v ↦ function(v)`` for a linear function of a flat vector, as a program that was recorded.

    It runs without the function's code, without autograd and without the primal pass.

    Args:
        plan: the program.
        constants: what it reads beside the vector.
        captures: whether it is to be replayed by a CUDA graph, where the device is one of CUDA's.
    """

    def __init__(self, plan: Plan, constants: Sequence[Tensor], *, captures: bool = False) -> None:
        self.plan = plan
        self._captures = captures
        self._count = 0
        self._values: list[Any] = [None] * plan.size + list(constants)
        self._seen: tuple[Tensor | None, int] = (None, 0)
        self._calls: FixedCalls | None = None

    @torch.no_grad()
    def multiply(self, rows: Tensor) -> Tensor:
        """The values at several vectors, as rows, by one run of a program that is not optimised.

        Raises:
            RuntimeError: ``torch.vmap`` does not know an operation.
        """
        plan, output = self.plan, self.plan.output
        if output is None:
            assert plan.zero is not None
            return plan.zero.expand(len(rows), -1).clone()

        def replay(v: Tensor) -> Tensor:
            values = self._values.copy()
            values[0] = v
            run(plan.program, plan.last_uses[1], values)
            return values[output]

        return torch.vmap(replay)(rows)

    @torch.no_grad()
    def __call__(self, v: Tensor) -> Tensor:
        """The function's value at another vector.

        If the same tensor object is passed again (CG updates it in place), its views are reused.
        """
        plan = self.plan
        if plan.output is None:
            assert plan.zero is not None
            return plan.zero.clone()  # linear, and the same for every vector
        if self._captures and plan.can_capture:
            self._count += 1
            # The first call is a plain one: libraries make themselves ready, which cannot be captured.
            if (plan.captured or self._count > 1) and self._capture(v):
                assert plan.captured is not None
                return plan.captured(v, self)
        if self._seen[0] is v and self._seen[1] == v.data_ptr():
            if self._calls is None:
                self._fix()
            if self._calls is not None:
                return self._calls()
        else:
            self._seen, self._calls = (v, v.data_ptr()), None
            self._values[0] = v
            run(plan.views, plan.last_uses[0], self._values)
        # Slots of constants and of the vector's views; the program fills the others.
        values = self._values.copy()
        run(plan.program, plan.last_uses[1], values)
        return values[plan.output]

    def _capture(self, v: Tensor) -> bool:
        """Have the program captured, if it is not yet; whether it is."""
        plan = self.plan
        if plan.captured is None:
            try:
                plan.captured = CapturedCalls(plan, v, self)
            except RuntimeError as error:
                plan.can_capture = False
                reason = str(error).strip().splitlines()[0]
                logger.info("products are replayed without a CUDA graph, because %s", reason)
        return plan.captured is not None

    def _fix(self) -> None:
        plan = self.plan
        if plan.layout is None:
            plan.layout = Layout(plan, self._values.copy())
        if plan.layout.is_possible:
            self._calls = FixedCalls(plan, plan.layout, self._values)

    @property
    def constants(self) -> list[Tensor]:
        """What it reads beside the vector."""
        return self._values[self.plan.size :]


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
    """

    # Gain: 17 % of a policy's product; nothing is allocated, and nothing that
    # only looks at memory is called again.
    def __init__(self, plan: Plan, values: list[Any]) -> None:
        self.results: list[int | None] = []
        self.buffers: list[tuple[Any, ...]] = []
        self.is_possible = plan.bytes <= _HELD * plan.length and bool(plan.program)
        if not self.is_possible:
            return
        memories, kinds = self._run(plan, values)
        if not self.is_possible:
            return
        last_read: dict[int, int] = {}
        for index, operation in enumerate(plan.program):
            for slot in [*operation.slots, *_outputs_of(operation)]:
                last_read[memories[slot]] = index
        last = plan.program[-1]
        fact = facts(last.function)
        # It may give the function's result, which is made anew each time.
        if not (fact.shares_memory or fact.in_place) and last.outputs != [(None, plan.output)]:
            self.is_possible = False
            return
        free: dict[Any, list[int]] = {}
        held: dict[int, int] = {}  # the buffer that stands for what the run put into a memory
        for index, operation in enumerate(plan.program):
            fact, buffer = facts(operation.function), None
            if not (fact.shares_memory or fact.in_place or operation is last):
                if [i for i, _ in operation.outputs] != [None] or not _into(operation.function):
                    self.is_possible = False
                    return
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

    def _run(self, plan: Plan, values: list[Any]) -> tuple[dict[int, int], dict[int, Any]]:
        """Of each slot, a number for the memory that it lies in, and how it lies there."""
        memories: dict[int, int] = {}
        kinds: dict[int, Any] = {}
        count = 0

        def look(slot: int) -> None:
            nonlocal count
            tensor = values[slot]
            if type(tensor) not in (Tensor, torch.nn.Parameter):
                self.is_possible = False  # it need not say where it lies
                return
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


class FixedCalls:
    """A program on one vector, whose values may change, with memory of its own for all that it computes.

    Args:
        plan: the program.
        layout: of that memory.
        values: of its slots: the vector, its views, and constants.
    """

    def __init__(self, plan: Plan, layout: Layout, values: list[Any]) -> None:
        assert plan.output is not None
        values = values.copy()
        buffers = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype, device in layout.buffers
        ]
        self._calls: list[tuple[Any, list[Any], dict[str, Any]]] = []
        for operation, buffer in zip(plan.program, layout.results, strict=True):
            function: Any = operation.function
            args, kwargs = operation.filled(values)
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
        self._result: Tensor | None = values[plan.output]

    def __call__(self) -> Tensor:
        """The function's value, in memory of its own."""
        result: Any = None
        for function, args, kwargs in self._calls:
            result = function(*args, **kwargs)
        return result if self._result is None else self._result.clone()


class CapturedCalls:
    """A program in a CUDA graph: one launch for all of its operations.

    A graph reads and writes the memory that it was captured with. So the vector and the constants are
    copied there first, the constants once for each recording that comes, and the result is copied from
    there.

    Args:
        plan: the program.
        v: a vector like those that will come.
        recording: whose constants are copied first.

    Raises:
        RuntimeError: the program, or the device, cannot be captured.
    """

    def __init__(self, plan: Plan, v: Tensor, recording: Recording) -> None:
        assert plan.output is not None
        if not _is_cuda(v):
            raise RuntimeError(f"cuda_graphs is for devices of CUDA, and this one is {v.device}")
        self._vector = v.clone(memory_format=torch.contiguous_format)
        self._constants = [constant.clone() for constant in recording.constants]
        self._of = weakref.ref(recording)
        values: list[Any] = [None] * plan.size + self._constants
        values[0] = self._vector
        run(plan.views, plan.last_uses[0], values)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=_share_pool()):
            run(plan.program, plan.last_uses[1], values)
            self._result: Tensor = values[plan.output]

    def __call__(self, v: Tensor, recording: Recording) -> Tensor:
        """The function's value for the constants of a recording, in memory of its own."""
        if self._of() is not recording:
            self._of = weakref.ref(recording)
            for own, constant in zip(self._constants, recording.constants, strict=True):
                own.copy_(constant)
        self._vector.copy_(v)
        self._graph.replay()
        return self._result.clone()


def _is_cuda(v: Tensor) -> bool:
    return v.is_cuda


@cache
def _share_pool() -> Any:
    """Memory for what graphs compute on the way: no result is left there when the next one is replayed."""
    return torch.cuda.graph_pool_handle()
