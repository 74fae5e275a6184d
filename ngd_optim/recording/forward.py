"""Record what a closure computes from the parameters, once, and replay it at other parameters.

The program is the function whose gradient autograd gives. What autograd holds fixed is a constant
of it: detached tensors, all that is computed under ``no_grad``, random numbers. The closure's own
code runs once, and whatever else it does happens once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ngd_optim.aten import STATISTICS, facts, find_written, tensors_of
from ngd_optim.autograd_graph import leaves
from ngd_optim.program import (
    CannotReplayError,
    Input,
    Operation,
    release_held,
    take_slots_out,
)
from ngd_optim.recording.forward_program import ForwardProgram
from ngd_optim.recording.trace import Place, Trace
from ngd_optim.torch_internals import DispatchMode, materialize, memory_of

_aten = torch.ops.aten
_DETACH, _DROPOUT = _aten.detach.default, _aten.native_dropout.default
_RECORDERS = count(1)
_NO_KWARGS: dict[str, Any] = {}
"""Of all operations without any: one object, and nobody writes to it."""

_WRITES_PARAMETERS = "the closure writes to its parameters"

_Mark = tuple[int, str]
"""The slot of a tensor that depends on the parameters, and why autograd does not follow it.

It is empty if autograd follows it. Else it is ``"detached"``, ``"no_grad"``, ``"random"`` (drawn), or
``"constant"``: made a leaf of the closure's own by ``requires_grad_()``, or computed from such leaves
alone. A tensor of the first three kinds that has a history nevertheless is one of which autograd
learnt later, and is followed; the history of what is constant ends at those leaves.
"""


class _TensorMark(tuple[int, int, str]):
    """What a tensor carries as an attribute: the number of the recorder that saw it, and the mark's two parts.

    A copy of a tensor (``copy.deepcopy``, ``pickle``) takes attributes along, but the recorder has not
    seen it: its mark is empty.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return set, ()  # which torch.load takes with weights_only


class ForwardRecorder(DispatchMode):
    """Notes the operations on the parameters while a closure runs, in the order of the run.

    It follows what autograd follows, by marks on tensors, and memory where a tensor is written to.

    Args:
        parameters: what the program is a function of.
        on_draw: is told of each generator that random numbers are about to be drawn from, None for
            a global one.

    Attributes:
        reads_values: whether the closure read a number that depends on the parameters, other than
            True or False.
        has_conditions: whether it went one way of several, depending on the parameters.
        uses_float16: whether it computed something in float16 from the parameters.
        held: why autograd holds fixed what depends on the parameters and meets what it follows: of
            the second parts of marks.
        problem: why there is no program; None if there is one.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        on_draw: Callable[[torch.Generator | None], None] = lambda generator: None,
    ) -> None:
        super().__init__()
        self._on_draw = on_draw
        self._number = next(_RECORDERS)
        self._inputs: dict[int, _Mark] = {id(p): (slot, "") for slot, p in enumerate(parameters)}
        self._parameters = parameters
        self._memories = list(range(len(parameters)))  # of each slot, a number
        self._places: dict[int, Place] = {}
        for slot, p in enumerate(parameters):
            self._note_place(slot, p)
        self._cuts: list[str] = []
        self._left_out: list[Any] = []  # arguments that the program does without
        # Memory that was written to, its first slot, and what keeps others from getting that memory.
        self._owned: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._operations: list[Operation] = []
        self._constants: dict[Any, list[tuple[Any, Any, Tensor]]] = {}  # by memory
        self._elsewhere: dict[int, Tensor] = {}  # has a history without the parameters
        self._searched = 0  # so many operations, for constants
        self._paused = False
        self.reads_values = False
        self.has_conditions = False
        self.uses_float16 = False
        self.held: set[str] = set()
        self._of_functions: set[int] = set()  # slots of what they gave
        self.problem: str | None = None

    def program(
        self,
        outputs: Sequence[Tensor],
        *,
        predicted: Sequence[Tensor] = (),
        fixed: Sequence[Tensor] = (),
        conditions: bool = False,
    ) -> ForwardProgram:
        """What computes some tensors of the run.

        Args:
            outputs: tensors that it computes as autograd takes them.
            predicted: further ones, of which it also computes what autograd holds fixed.
            fixed: tensors that it takes as constants.
            conditions: whether a replay fails where the closure would go another way.

        Raises:
            CannotReplayError: there is a problem; the message says which.
        """
        slots = [self._followed_slot(out) for out in outputs]
        slots += [self._slot(out) for out in predicted]
        constants = {self._followed_slot(t): t.detach() for t in fixed}
        if self.problem is not None:
            raise CannotReplayError(self.problem)
        operations = [
            operation
            for operation in self._operations
            if (operation.expected is None or conditions)
            and not any(slot in constants for _, slot in operation.outputs)
        ]
        memories = self._memories
        if predicted:
            operations, twins, memories = release_held(operations, memories)
            n = len(outputs)
            slots[n:] = [slot if slot is None else twins.get(slot, slot) for slot in slots[n:]]
        tensors = [*outputs, *predicted]
        return ForwardProgram.of(
            operations,
            memories,
            [t.detach() if slot is None else slot for slot, t in zip(slots, tensors, strict=True)],
            {slot: constant for slot, constant in constants.items() if slot is not None},
            self._of_functions,
        )

    def trace(self, about: Any) -> Trace:
        """The run as it can be compared with another one, with what tells beside the operations what it is."""
        about = about, self._left_out
        return Trace(self._parameters, self._operations, self._places, self._cuts, about)

    def _note_place(self, slot: int, tensor: Tensor) -> None:
        try:  # noqa: SIM105  (a context takes longer than what is in it)
            self._places[slot] = Place.of(tensor)
        except (RuntimeError, NotImplementedError):
            pass  # sparse tensors and wrappers have none

    def note_detached(self, tensor: Tensor) -> None:
        """A tensor is cut off from its history, which no operation tells."""
        mark = self._find(tensor)
        if mark is not None:
            self._mark(tensor, mark[0], mark[1] or "detached")

    def fail(self, problem: str) -> None:
        """There is no program, for this reason if it is the first one."""
        self.problem = self.problem or problem

    def note_written_parameters(self) -> None:
        """The closure changes what the program would be a function of."""
        self.fail(_WRITES_PARAMETERS)

    def note_read(self, tensor: Tensor) -> None:
        """A tensor's numbers are read, which no operation tells."""
        self.reads_values |= self.has_seen(tensor)

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the parameters in this run, in a way that autograd follows."""
        return self._followed_slot(tensor) is not None

    def has_seen(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the parameters in any way."""
        return self._find(tensor) is not None

    @property
    def calls_functions(self) -> bool:
        """Whether something was met that makes ``has_functions`` of a program true."""
        return bool(self._of_functions)

    @cached_property
    def _parameter_memories(self) -> set[Any]:
        return {memory_of(p) for p in self._parameters}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is noted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        func = materialize(func)
        fact = facts(func)
        if fact.random:
            self._on_draw(kwargs.get("generator"))
        if self._paused or fact.asks_about_shapes:
            return func(*args, **kwargs)
        if func is _DETACH:  # autograd calls it too, for what it saves
            return self._detach(args[0])
        written = find_written(fact, args, kwargs) if fact.written else []
        call = self._find_inputs(func, args, kwargs, written)
        if call is None:
            for tensor in written:
                self.keep_constants(tensor)
            return func(*args, **kwargs)
        if written and self._own_all(written):
            call = self._find_inputs(func, args, kwargs, written) or call
        operation, cut = call
        if fact.looks_at_shapes_only:
            return func(*args, **kwargs)
        if fact.random:
            if written:
                self.fail(f"{func} changes what depends on the parameters at random")
            cut = "random"
        if fact.has_statistics:
            self._left_out += _leave_statistics_alone(operation)
        result = func(*args, **kwargs)
        tensors = tensors_of(result)
        if not tensors and not written:
            return self._note_reading(operation, result)
        if func is _DROPOUT and cut == "random" and torch.is_grad_enabled():
            _fix_mask(operation, result)
            tensors, cut = [(None, result[0])], ""
        memory = self._memories[operation.inputs[0][2]] if fact.shares_memory else None
        is_new = not written or fact.shares_memory
        for index, tensor in tensors:
            slot = self._new_slot(tensor, memory, cut) if is_new else self._rewrite(tensor, cut)
            operation.outputs.append((index, slot))
        self._operations.append(operation)
        return result

    def _find_inputs(
        self, func: Any, args: Any, kwargs: Any, written: list[Tensor]
    ) -> tuple[Operation, str] | None:
        """The operation, without outputs, and why autograd does not follow it; None if it has no inputs.

        What autograd does not follow is a constant to an operation that it does follow.
        """
        found: list[tuple[Tensor, str]] = []

        def slot_of(tensor: Tensor) -> int | None:
            mark = self._find(tensor)
            if mark is None:
                return None
            found.append((tensor, mark[1]))
            return mark[0]

        inputs: list[Input] = []
        own_args = take_slots_out(list(args), inputs, slot_of)
        own_kwargs = take_slots_out(dict(kwargs), inputs, slot_of) if kwargs else _NO_KWARGS
        if not found:
            return None
        cuts = {cut for _, cut in found}
        is_followed = torch.is_grad_enabled() and "" in cuts
        held: Sequence[Input] = ()
        if is_followed and len(cuts) > 1:
            inputs, held = _put_back(inputs, found, written)
            self.held |= cuts - {""}
        if is_followed:
            cut = ""
        elif torch.is_grad_enabled():
            cut = "constant" if "constant" in cuts else "detached"
        else:
            cut = "constant" if cuts == {"constant"} else "no_grad"
        return Operation(func, own_args, own_kwargs, inputs, [], held), cut

    def _detach(self, tensor: Tensor) -> Tensor:
        # What was kept of an earlier run may be detached; used with its history it may not.
        result, mark = _aten.detach.default(tensor), self._find(tensor, is_used=False)
        if mark is not None:
            self._mark(result, mark[0], mark[1] or "detached")
        return result

    def _note_reading(self, operation: Operation, result: Any) -> Any:
        # The closure does the same wherever it gets the same answer. Other numbers may be read to
        # be shown, or to compute with.
        if isinstance(result, bool):
            operation.expected = result
            self._operations.append(operation)
            self.has_conditions = True
        else:
            self.reads_values = True
        return result

    def _slot(self, tensor: Tensor) -> int | None:
        mark = self._find(tensor)
        return None if mark is None else mark[0]

    def _followed_slot(self, tensor: Tensor) -> int | None:
        mark = self._find(tensor)
        return None if mark is None or mark[1] else mark[0]

    def _find(self, tensor: Tensor, *, is_used: bool = True) -> _Mark | None:
        """The mark of a tensor that depends on the parameters; None of others.

        What the question brings to light is noted: that random numbers or something from before the
        run are differentiated (``problem``), that a tensor comes from an ``autograd.Function``, that it
        is a view of memory that was written to (an operation, see :meth:`_note_view`).

        Args:
            tensor: any.
            is_used: whether the closure computes with it, history and all.
        """
        number, slot, cut = getattr(tensor, "_ngd_mark", None) or (0, 0, "")
        if number != self._number:
            if (mark := self._inputs.get(id(tensor))) is None:
                return self._find_by_memory(tensor, is_used=is_used)
            return mark if tensor.requires_grad else (mark[0], "detached")  # frozen for a while
        if cut == "random" and not _has_history(tensor):
            return None  # what was drawn is a constant, whatever is asked of it
        if cut and tensor.requires_grad and tensor.is_leaf:
            return slot, "constant"
        if cut in ("", "constant") or not _has_history(tensor):
            return slot, cut
        if cut == "random":
            self.fail("random numbers are drawn in a way that is differentiated")
        # An autograd.Function runs under no_grad, and autograd follows what it gives.
        if cut == "no_grad":
            self._of_functions.add(slot)
        return slot, ""

    def _find_by_memory(self, tensor: Tensor, *, is_used: bool) -> _Mark | None:
        """The mark of a tensor that had none when it was made, in memory that was written to since."""
        if self._owned and (owned := self._owned.get(memory_of(tensor))) is not None:
            return self._note_view(tensor, owned[0], "" if _has_history(tensor) else "no_grad")
        is_asked = is_used and self.problem is None and _has_history(tensor)
        if is_asked and self._comes_from_parameters(tensor):
            self.fail(
                "something was computed from the parameters before the closure ran, in another thread "
                "or by code that torch does not see"
            )
        return None

    def _comes_from_parameters(self, tensor: Tensor) -> bool:
        """Whether a tensor that was not made in this run depends on the parameters; asked once of each."""
        if id(tensor) in self._elsewhere:
            return False
        self._elsewhere[id(tensor)] = tensor
        return any(id(leaf) in self._inputs for leaf in leaves(tensor))

    def _own_all(self, written: list[Tensor]) -> bool:
        """Before tensors are written to: let them lie in memory that each replay makes anew; whether some did not."""
        if any(memory_of(tensor) in self._parameter_memories for tensor in written):
            self.note_written_parameters()
            return False
        foreign = [tensor for tensor in written if self._find(tensor) is None]
        for tensor in foreign:
            self.keep_constants(tensor)
            with self.paused():
                length = tensor.untyped_storage().nbytes() // tensor.element_size()
                flat = tensor.detach().as_strided((length,), (1,), 0).clone()
            base = len(self._memories)
            self._memories.append(base)
            self._owned[memory_of(tensor)] = base, tensor.untyped_storage()
            self._operations.append(Operation(_aten.clone.default, [flat], {}, [], [(None, base)]))
            self._note_view(tensor, base, "no_grad")
        return bool(foreign)

    def _note_view(self, tensor: Tensor, base: int, cut: str) -> _Mark:
        """Add the operation that makes a tensor, as a view of the memory that another slot lies in; its mark."""
        args = [None, tensor.shape, tensor.stride(), int(tensor.storage_offset())]
        slot = self._new_slot(tensor, self._memories[base], cut)
        self._operations.append(
            Operation(_aten.as_strided.default, args, {}, [(args, 0, base)], [(None, slot)])
        )
        return slot, cut

    def _rewrite(self, tensor: Tensor, cut: str) -> int:
        """The slot of a tensor that has another value now."""
        found = self._find(tensor)
        if found is None:  # an output that was no argument
            return self._new_slot(tensor, None, cut)
        slot, before = found
        # Autograd takes it for what it was, or for what an autograd.Function says.
        if cut == "no_grad" and not before:
            self._of_functions.add(slot)
        self._mark(tensor, slot, before and cut)
        self._cuts.append(cut)
        return slot

    def _new_slot(self, tensor: Tensor, memory: int | None, cut: str) -> int:
        slot = len(self._memories)
        self._memories.append(slot if memory is None else memory)
        if memory is None:
            self._note_place(slot, tensor)
        self._cuts.append(cut)
        self.uses_float16 |= tensor.dtype is torch.float16
        self._mark(tensor, slot, cut)
        return slot

    def _mark(self, tensor: Tensor, slot: int, cut: str) -> None:
        tensor._ngd_mark = _TensorMark((self._number, slot, cut))  # pyright: ignore

    def keep_constants(self, tensor: Tensor) -> None:
        """Before memory is written to: the program keeps what its constants hold there now."""
        for operation in self._operations[self._searched :]:
            self._note_constants(operation.args)
            self._note_constants(operation.kwargs)
        self._searched = len(self._operations)
        with self.paused():
            for place, key, value in self._constants.pop(memory_of(tensor), ()):
                place[key] = value.detach().clone()

    def _note_constants(self, place: Any) -> None:
        for key, value in place.items() if isinstance(place, dict) else enumerate(place):
            if isinstance(value, Tensor):
                self._constants.setdefault(memory_of(value), []).append((place, key, value))
            elif isinstance(value, list):
                self._note_constants(value)


def _has_history(tensor: Tensor) -> bool:
    return tensor.requires_grad and not tensor.is_leaf


def _put_back(
    inputs: list[Input], found: list[tuple[Tensor, str]], written: list[Tensor]
) -> tuple[list[Input], list[Input]]:
    """The inputs that autograd follows or that are written to, and the others, put back as constants."""
    kept, held = [], []
    for (place, key, slot), (tensor, cut) in zip(inputs, found, strict=True):
        if cut and not any(tensor is w for w in written):
            place[key] = tensor
            held.append((place, key, slot))
        else:
            kept.append((place, key, slot))
    return kept, held


def _leave_statistics_alone(norm: Operation) -> list[Any]:
    """Let it not change them; what is taken from its arguments for that."""
    mean, variance, change = STATISTICS[norm.function]
    taken = [norm.args[mean], norm.args[variance]]
    if norm.args[change]:
        norm.args[mean] = norm.args[variance] = None
    return taken


def _fix_mask(dropout: Operation, result: Any) -> None:
    """Make it a product with the mask that was drawn."""
    (_, _, slot), *_ = dropout.inputs
    keep = 1 - dropout.args[1]
    dropout.function = _aten.mul.Tensor
    dropout.args = [None, result[1] * (1 / keep if keep else 0.0)]
    dropout.inputs = [(dropout.args, 0, slot)]
