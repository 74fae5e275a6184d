"""A straight-line program of aten operations, what it needs, and how it runs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ngd_optim.recording.aten import facts
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


@dataclass
class Operation:
    """One call. Tensors that the program computes are in numbered slots; everything else stands in the arguments.

    Attributes:
        function: an aten overload.
        args, kwargs: its arguments, with None where a slot goes.
        inputs: the list or dict in them, the index or key, and the slot.
        outputs: the index in the result, or None where that is one tensor, and the slot.
        slots: those that it reads, in the order of ``inputs``.
        last_uses: slots that no later operation needs.
    """

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    inputs: list[tuple[Any, Any, int]]
    outputs: list[tuple[int | None, int]]
    slots: list[int] = field(init=False)
    last_uses: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.read(self.inputs)

    def read(self, inputs: list[tuple[Any, Any, int]]) -> None:
        """Let it have other inputs."""
        self.inputs, self.slots = inputs, [slot for _, _, slot in inputs]

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
    program: list[Operation], metas: list[Meta], outputs: Iterable[int], sharing: Sharing
) -> list[Operation]:
    """The operations that some slots need."""

    def memory(slot: int) -> int:
        return sharing.of(metas[slot].memory)

    # Backwards, from what is wanted. An operation counts if it makes a needed slot, or writes to
    # memory that one lies in.
    needed = set(outputs)
    memories = {memory(slot) for slot in needed}
    kept = []
    for operation in reversed(program):
        results = [slot for _, slot in operation.outputs]
        if not needed.isdisjoint(results) or any(
            memory(slot) in memories for slot in operation.written_slots
        ):
            needed.update(operation.slots)
            memories.update(memory(slot) for slot in operation.slots)
            kept.append(operation)
    return kept[::-1]


def note_last_uses(program: list[Operation], outputs: Iterable[int]) -> None:
    """Let each operation know which slots nothing needs after it."""
    needed = set(outputs)
    for operation in reversed(program):
        used = {slot for _, slot in operation.outputs} | set(operation.slots)
        operation.last_uses = list(used - needed)
        needed |= used


def run(program: list[Operation], values: list[Any]) -> None:
    """Compute the slots of a program, in place; each is emptied after its last use."""
    for operation in program:
        for place, key, slot in operation.inputs:
            place[key] = values[slot]
        result = operation.function(*operation.args, **operation.kwargs)
        # Or the arguments would keep every intermediate result alive.
        for place, key, _ in operation.inputs:
            place[key] = None
        for index, slot in operation.outputs:
            values[slot] = result if index is None else result[index]
        for slot in operation.last_uses:
            values[slot] = None
