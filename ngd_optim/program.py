"""A straight-line program of aten operations, and rewrites that make it shorter without changing what it computes."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngd_optim.aten import facts

_aten = torch.ops.aten
_MATMUL_AND_ADD = {_aten.mm.default: _aten.addmm.default, _aten.bmm.default: _aten.baddbmm.default}
_FUSED = set(_MATMUL_AND_ADD.values())


class Meta(NamedTuple):
    """What is known of the tensor in a slot.

    Tensors that share memory have the same ``memory``; ``flags`` are the lazy conjugation and negation.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    flags: tuple[bool, bool]
    memory: int

    @property
    def kind(self) -> tuple[Any, ...]:
        """All but the memory."""
        return self[:4]


@dataclass
class Operation:
    """One call. Tensors that the program computes are in numbered slots; everything else stands in the arguments.

    Attributes:
        function: an aten overload.
        args, kwargs: its arguments, with None where a slot goes.
        inputs: the list or dict in them, the index or key, and the slot.
        outputs: the index in the result, or None where that is one tensor, and the slot.
        last_uses: slots that no later operation needs.
    """

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    inputs: list[tuple[Any, Any, int]]
    outputs: list[tuple[int | None, int]]
    last_uses: list[int] = field(default_factory=list)

    @property
    def writes(self) -> bool:
        """Whether it changes one of its arguments."""
        return facts(self.function).in_place

    @property
    def slots(self) -> list[int]:
        """The slots that it reads."""
        return [slot for _, _, slot in self.inputs]


class _Sharing:
    """Which pieces of memory rewrites have made one."""

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


def optimised(program: list[Operation], metas: list[Meta], output: int) -> list[Operation]:
    """A program that computes the same output slot from slot 0, with fewer and cheaper operations."""
    sharing = _Sharing()
    program = _without_added_zeros(program, metas, output, sharing)
    program = _without_copies(program, metas, sharing)
    program = _without_dead_code(program, output)
    program = _with_fused_products(program, metas, output)
    program = _without_dead_code(program, output)
    _reuse_memory(program, metas, output, sharing)
    _note_last_uses(program, output)
    return program


def _without_added_zeros(
    program: list[Operation], metas: list[Meta], output: int, sharing: _Sharing
) -> list[Operation]:
    """``x + 0``, which forward mode makes of inputs without a tangent, is ``x``, expanded.

    Only where pointwise operations read it, which do not mind how it lies in memory.
    """
    particular = {output} | {slot for op in program if not facts(op.function).pointwise for slot in op.slots}
    for operation in program:
        if operation.function is not _aten.add.Tensor or len(operation.inputs) != 1 or operation.kwargs:
            continue
        (_, position, slot), result = operation.inputs[0], operation.outputs[0][1]
        other, meta = operation.args[1 - position], metas[slot]
        if result in particular or meta.dtype != metas[result].dtype or not isinstance(other, Tensor) or other.any():
            continue
        shape = metas[result].shape
        operation.function, operation.args = _aten.expand.default, [None, list(shape)]
        operation.inputs = [(operation.args, 0, slot)]
        sharing.join(metas[result].memory, meta.memory)
        expanded = torch.empty_strided(meta.shape, meta.stride, device="meta").expand(shape)
        metas[result] = metas[result]._replace(stride=expanded.stride())
    return program


def _without_copies(program: list[Operation], metas: list[Meta], sharing: _Sharing) -> list[Operation]:
    """A fresh tensor that is only filled with a copy of another is that other."""
    written = Counter(metas[op.slots[0]].memory for op in program if op.writes and op.inputs[0][0] is op.args)
    fresh = {op.outputs[0][1] for op in program if op.function is _aten._new_zeros_with_same_feature_meta.default}
    same: dict[int, int] = {}
    kept = []
    for operation in program:
        operation.inputs = [(place, key, same.get(slot, slot)) for place, key, slot in operation.inputs]
        if operation.function is _aten.copy_.default and len(operation.inputs) == 2 and operation.slots[0] in fresh:
            target, source = operation.slots
            untouched = written[metas[target].memory] == 1 and metas[source].memory not in written
            if untouched and metas[target].kind == metas[source].kind:
                same[target] = source
                sharing.join(metas[target].memory, metas[source].memory)
                continue
        kept.append(operation)
    return kept


def _with_fused_products(program: list[Operation], metas: list[Meta], output: int) -> list[Operation]:
    """``x + A B`` in one operation, where nothing else needs ``A B``."""
    uses = Counter([output, *(slot for operation in program for slot in operation.slots)])
    products = {op.outputs[0][1]: op for op in program if op.function in _MATMUL_AND_ADD}
    for operation in program:
        if operation.function is not _aten.add.Tensor or operation.kwargs or len(operation.args) != 2:
            continue
        for place, position, slot in reversed(operation.inputs):
            product = products.get(slot)
            same_shape = metas[slot].shape == metas[operation.outputs[0][1]].shape
            if product is None or not same_shape or place is not operation.args or uses[slot] > 1:
                continue
            added = operation.args[1 - position]
            added_slots = [s for _, key, s in operation.inputs if key == 1 - position]
            operation.function = _MATMUL_AND_ADD[product.function]
            operation.args = [added, *product.args]
            operation.inputs = [(operation.args, 0, s) for s in added_slots]
            operation.inputs += [(operation.args, key + 1, s) for _, key, s in product.inputs]
            break
    return program


def _reuse_memory(program: list[Operation], metas: list[Meta], output: int, sharing: _Sharing) -> None:
    """Let a pointwise operation, or a fused product, write its result over an argument that ends there."""

    def memory(slot: int) -> int:
        return sharing.of(metas[slot].memory)

    end = len(program)
    last = {memory(slot): i for i, op in enumerate(program) for slot in [*op.slots, *(s for _, s in op.outputs)]}
    last |= {memory(0): end, memory(output): end}
    for index, operation in enumerate(program):
        fused = operation.function in _FUSED
        if operation.writes or operation.kwargs or not (fused or facts(operation.function).pointwise):
            continue
        variant, result = _out_variant(operation.function), operation.outputs[0][1]
        used = Counter(memory(slot) for slot in operation.slots)
        for place, position, slot in operation.inputs:
            over = memory(slot)
            ends_here = last[over] == index and used[over] == 1 and metas[slot].kind == metas[result].kind
            if variant is None or not ends_here or place is not operation.args or (fused and position != 0):
                continue
            operation.function, name = variant
            operation.kwargs = {name: None}
            operation.inputs = [*operation.inputs, (operation.kwargs, name, slot)]
            last[over] = last[memory(result)]
            sharing.join(memory(result), over)
            break


@cache
def _out_variant(function: Any) -> tuple[Any, str] | None:
    """The overload that writes its result to a given tensor, and that argument's name."""
    packet = function.overloadpacket
    wanted = [(a.name, str(a.type)) for a in function._schema.arguments]
    for name in packet.overloads():
        overload = getattr(packet, name)
        arguments = overload._schema.arguments
        outs = [a.name for a in arguments if a.is_out]
        if len(outs) == 1 and [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return overload, outs[0]
    return None


def _without_dead_code(program: list[Operation], output: int) -> list[Operation]:
    """The operations that the output needs, and those that write in place."""
    kept, needed = [], {output}
    for operation in reversed(program):
        if operation.writes or not needed.isdisjoint(slot for _, slot in operation.outputs):
            needed.update(operation.slots)
            kept.append(operation)
    return kept[::-1]


def _note_last_uses(program: list[Operation], output: int) -> None:
    needed = {output}
    for operation in reversed(program):
        used = {slot for _, slot in operation.outputs} | set(operation.slots)
        operation.last_uses = list(used - needed)
        needed |= used
