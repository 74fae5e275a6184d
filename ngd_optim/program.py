"""A straight-line program of aten operations, what it needs, and how it runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngd_optim.aten import facts
from ngd_optim.torch_internals import schema_of


class Meta(NamedTuple):
    """What is known of the tensor in a slot.

    Tensors that share memory have the same ``memory``; ``flags`` are the lazy conjugation and
    negation.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    flags: tuple[bool, bool]
    offset: int
    memory: int

    @property
    def kind(self) -> tuple[Any, ...]:
        """All but where it is."""
        return self[:4]

    @property
    def bytes(self) -> int:
        """How large it is."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def place(self) -> tuple[torch.Size, tuple[int, ...], int]:
        """How it lies in its memory."""
        return self.shape, self.stride, self.offset


Input = tuple[Any, Any, int]
"""The list or dict of arguments, the index or key in it, and the slot whose tensor goes there."""


@dataclass(slots=True)
class Operation:
    """One call. Tensors that the program computes are in numbered slots; everything else stands in the arguments.

    Attributes:
        function: an aten overload.
        args, kwargs: its arguments, with None where a slot goes.
        inputs: where slots go in them.
        outputs: the index in the result, or None where that is one tensor, and the slot.
        held: as ``inputs``, for slots that it does not read, because autograd takes what was in them
            as constants; these stand in the arguments.
        expected: what it must give, for an operation that gives True or False; else None.
    """

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    inputs: list[Input]
    outputs: list[tuple[int | None, int]]
    held: Sequence[Input] = ()
    expected: bool | None = None

    @property
    def slots(self) -> list[int]:
        """Those that it reads, in the order of ``inputs``."""
        # Not kept: a list more for each operation of a run, for the garbage collector to look at.
        return [slot for _, _, slot in self.inputs]

    def twin(self, twins: dict[int, int]) -> "Operation":
        """The same of other slots, reading what it holds fixed as well; its arguments are copies."""
        args, kwargs, inputs = self._copy([*self.inputs, *self.held])
        inputs = [(place, key, twins.get(slot, slot)) for place, key, slot in inputs]
        outputs = [(index, twins.get(slot, slot)) for index, slot in self.outputs]
        return Operation(self.function, args, kwargs, inputs, outputs, expected=self.expected)

    def filled(self, values: list[Any]) -> tuple[list[Any], dict[str, Any], list[Input]]:
        """Copies of its arguments, with what is in the slots, and where in them that is."""
        args, kwargs, inputs = self._copy(self.inputs)
        for place, key, slot in inputs:
            place[key] = values[slot]
        return args, kwargs, inputs

    def _copy(self, inputs: Sequence[Input]) -> tuple[list[Any], dict[str, Any], list[Input]]:
        """Copies of its arguments, and inputs in these in place of inputs in its own."""
        places: dict[int, Any] = {}

        def copy(place: Any) -> Any:
            items = place.items() if isinstance(place, dict) else enumerate(place)
            copied = {
                key: copy(value) if isinstance(value, list) else value for key, value in items
            }
            places[id(place)] = copied if isinstance(place, dict) else list(copied.values())
            return places[id(place)]

        args, kwargs = copy(self.args), copy(self.kwargs)
        return args, kwargs, [(places[id(place)], key, slot) for place, key, slot in inputs]

    @property
    def writes(self) -> bool:
        """Whether it changes one of its arguments."""
        return facts(self.function).in_place

    @property
    def written_slots(self) -> list[int]:
        """The slots among them whose memory it changes."""
        if not self.writes:
            return []
        arguments = schema_of(self.function).arguments
        kept = {a.name for a in arguments if a.alias_info is None or not a.alias_info.is_write}
        kept |= {index for index, a in enumerate(arguments) if a.name in kept}
        top = (self.args, self.kwargs)
        return [
            slot
            for place, key, slot in self.inputs
            if not (any(place is t for t in top) and key in kept)
        ]


class CannotReplayError(RuntimeError):
    """An operation would not do the same again."""


class Sharing:
    """Which pieces of memory have been made one."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def of(self, memory: int) -> int:
        """The number that stands for all that are one with it."""
        while memory in self._parent:
            memory = self._parent[memory]
        return memory

    def join(self, memory: int, other: int) -> None:
        """Make two one."""
        memory, other = self.of(memory), self.of(other)
        if memory != other:
            self._parent[memory] = other


def remove_dead_code(
    program: list[Operation], outputs: Iterable[int], memory: Callable[[int], int]
) -> list[Operation]:
    """The operations that some slots need; ``memory`` numbers what a slot's tensor lies in."""
    # Backwards, from what is wanted. An operation counts if it makes a needed slot, writes to
    # memory that one lies in, or must give the same again.
    needed = set(outputs)
    memories = {memory(slot) for slot in needed}
    kept = []
    for operation in reversed(program):
        results = [slot for _, slot in operation.outputs]
        is_needed = operation.expected is not None or not needed.isdisjoint(results)
        if is_needed or any(memory(slot) in memories for slot in operation.written_slots):
            needed.update(operation.slots)
            memories.update(memory(slot) for slot in operation.slots)
            kept.append(operation)
    return kept[::-1]


def release_held(
    program: list[Operation], memories: Sequence[int]
) -> tuple[list[Operation], dict[int, int], Sequence[int]]:
    """The same operations, and twins of some that hold nothing fixed; of slots, the twins; of all slots, the memory.

    An operation has a twin if it holds something fixed, or reads what a twin computes; each has one if
    some of these write to memory.
    """
    found, affected = list[Operation](), set[int]()
    for operation in program:
        if operation.held or not affected.isdisjoint(operation.slots):
            found.append(operation)
            affected.update(slot for _, slot in operation.outputs)
    if any(operation.writes for operation in found):
        found = program
        affected = {slot for operation in program for _, slot in operation.outputs}
    twins = {slot: len(memories) + i for i, slot in enumerate(sorted(affected))}
    memory = {memories[slot]: number for slot, number in reversed(twins.items())}
    has_twin = {id(operation) for operation in found}
    result = list[Operation]()
    for operation in program:
        result.append(operation)
        if id(operation) in has_twin:
            result.append(operation.twin(twins))
    return result, twins, [*memories, *(memory[memories[slot]] for slot in twins)]


def find_last_uses(
    program: list[Operation], outputs: Iterable[int], below: float = math.inf
) -> list[Sequence[int]]:
    """For each operation, the slots, ``below`` a number, that nothing needs after it."""
    needed = set(outputs)
    last_uses: list[Sequence[int]] = []
    for operation in reversed(program):
        last = []
        for _, _, slot in operation.inputs:
            if slot not in needed and slot < below:
                needed.add(slot)
                last.append(slot)
        for _, slot in operation.outputs:
            if slot not in needed:
                last.append(slot)
        last_uses.append(tuple(last))
        needed.update([slot for _, slot in operation.outputs])
    return last_uses[::-1]


def run(program: list[Operation], last_uses: Sequence[Sequence[int]], values: list[Any]) -> None:
    """Compute the slots of a program, in place; each is emptied after its last use.

    Raises:
        CannotReplayError: an operation gives False where it gave True, or the other way round.
    """
    for operation, slots in zip(program, last_uses, strict=True):
        for place, key, slot in operation.inputs:
            place[key] = values[slot]
        result = operation.function(*operation.args, **operation.kwargs)
        # Or the arguments would keep every intermediate result alive.
        for place, key, _ in operation.inputs:
            place[key] = None
        if operation.expected is not None and result != operation.expected:
            raise CannotReplayError(
                f"{operation.function} gives {result} here, and gave {operation.expected} in the first run"
            )
        for index, slot in operation.outputs:
            values[slot] = result if index is None else result[index]
        for slot in slots:
            values[slot] = None


def take_slots_out(place: Any, inputs: list[Input], slot_of: Callable[[Tensor], int | None]) -> Any:
    """Nested arguments, with None where a tensor has a slot; such places are added to ``inputs``.

    Args:
        place: a list or dict of arguments; it is changed. Lists of tensors in it are copied.
        inputs: places, as in :class:`Operation`.
        slot_of: tells the slot of a tensor, or None.
    """
    for key, value in list(place.items()) if isinstance(place, dict) else enumerate(place):
        if isinstance(value, Tensor):
            slot = slot_of(value)
            if slot is not None:
                inputs.append((place, key, slot))
                place[key] = None
        elif isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
            place[key] = take_slots_out(list(value), inputs, slot_of)
    return place
