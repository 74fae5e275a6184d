"""Rewrites that make a recorded program shorter and cheaper without changing what it computes."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ngd_optim.aten import facts, find_out_variant
from ngd_optim.program import Meta, Operation, Sharing, remove_dead_code

_aten = torch.ops.aten
_MATMUL_AND_ADD = {_aten.mm.default: _aten.addmm.default, _aten.bmm.default: _aten.baddbmm.default}
_FUSED = set(_MATMUL_AND_ADD.values())


def optimise(
    program: list[Operation], metas: list[Meta], output: int, zeros: list[Tensor]
) -> tuple[list[Operation], list[Operation]]:
    """A program that computes the same output slot from slot 0, with fewer and cheaper operations.

    In two parts: the operations that only look at slot 0 in other ways, and what follows.
    Constants whose values make a difference to it, because they are zero, are added to ``zeros``.
    """
    # Without them a product takes longer: a policy's by 28 %, an MLP's by 45 %, a CNN's and a PINN's
    # by 9 %, a transformer's by 10 % (torch 2.13, one CPU thread). The gains below are counted alike.
    sharing = Sharing()

    def memory(slot: int) -> int:
        return sharing.of(metas[slot].memory)

    shifts = _find_offsets(program, metas)
    program = _remove_added_zeros(program, metas, output, sharing, zeros)
    program = _collapse_views(program, metas, output, shifts)
    program = remove_dead_code(program, [output], memory)
    program = _fuse_products(program, metas, output)
    program = remove_dead_code(program, [output], memory)
    views, rest = _split_off_views(program)
    _reuse_memory([*views, *rest], metas, output, sharing)
    return views, rest


def _split_off_views(program: list[Operation]) -> tuple[list[Operation], list[Operation]]:
    # before: p₁ = v[:n₁].view(…); …; p₂ = v[n₁:].view(…); … at every replay
    # after: all views of v once, kept while v is the same tensor, as CG's p is.
    # Gain: 9 % of a policy's product, 4 % of an MLP's.
    views, rest, slots = [], [], {0}
    for operation in program:
        if facts(operation.function).shares_memory and slots.issuperset(operation.slots):
            slots.update(slot for _, slot in operation.outputs)
            views.append(operation)
        else:
            rest.append(operation)
    return views, rest


def _rename(operation: Operation, same: dict[int, int]) -> None:
    """Let an operation read other slots in place of some."""
    if not same.keys().isdisjoint(operation.slots):
        operation.inputs = [
            (place, key, same.get(slot, slot)) for place, key, slot in operation.inputs
        ]


def _remove_added_zeros(
    program: list[Operation],
    metas: list[Meta],
    output: int,
    sharing: Sharing,
    found: list[Tensor],
) -> list[Operation]:
    """``x + 0``, which derivatives make of what has no tangent, is ``x``, expanded.

    If it has to be expanded, only where pointwise operations read it, which do not mind how it lies
    in memory.
    """
    # before: t = zeros_like(b); y = W v + t
    # after: y = W v. Gain: 3 to 8 % of dense layers' products.
    particular = {output} | {
        slot for op in program if not facts(op.function).pointwise for slot in op.slots
    }
    changed = {metas[slot].memory for op in program for slot in op.written_slots}
    zeros = {op.outputs[0][1] for op in program if op.function is _aten.zeros_like.default}
    zeros = {slot for slot in zeros if metas[slot].memory not in changed}

    def is_zero(operation: Operation, position: int) -> bool:
        slots = [
            slot
            for place, key, slot in operation.inputs
            if place is operation.args and key == position
        ]
        other = operation.args[position]
        if slots or not isinstance(other, Tensor):
            return bool(slots) and slots[0] in zeros
        is_zero = not other.any()
        if is_zero:
            found.append(other)
        return is_zero

    same: dict[int, int] = {}
    kept = []
    for operation in program:
        _rename(operation, same)
        kept.append(operation)
        if (
            operation.function is not _aten.add.Tensor
            or operation.kwargs
            or len(operation.args) != 2
        ):
            continue
        result = operation.outputs[0][1]
        for _, position, slot in operation.inputs:
            meta = metas[slot]
            if meta.dtype != metas[result].dtype or not is_zero(operation, 1 - position):
                continue
            untouched = changed.isdisjoint((meta.memory, metas[result].memory))
            if untouched and meta.kind == metas[result].kind and result != output:
                kept.pop()
                same[result] = slot
                sharing.join(metas[result].memory, meta.memory)
            elif result not in particular:
                shape = metas[result].shape
                operation.function, operation.args = _aten.expand.default, [None, list(shape)]
                operation.inputs = [(operation.args, 0, slot)]
                sharing.join(metas[result].memory, meta.memory)
                expanded = torch.empty_strided(meta.shape, meta.stride, device="meta").expand(shape)
                metas[result] = metas[result]._replace(stride=expanded.stride())
            break
    return kept


def _find_offsets(program: list[Operation], metas: list[Meta]) -> dict[int, int]:
    """How far views begin after what they are views of."""
    views = [op for op in program if facts(op.function).shares_memory and len(op.inputs) == 1]
    return {
        slot: metas[slot].offset - metas[op.slots[0]].offset
        for op in views
        for _, slot in op.outputs
    }


def _collapse_views(
    program: list[Operation], metas: list[Meta], output: int, shifts: dict[int, int]
) -> list[Operation]:
    """A view of a view is one view of the tensor below; one that lies as another is that one.

    How the vector itself lies is known only when it comes.
    """
    # before: a = x.t(); b = a.view(…); c = x.t()
    # after: b = as_strided(x, …), and c is a. Gain: up to 15 % where tensors are small.
    if any(facts(op.function).shares_memory and op.writes for op in program):
        return program  # a tensor was turned into a view of itself
    root: dict[int, int] = {0: 0}
    found: dict[Any, int] = {}
    same: dict[int, int] = {}
    kept = []
    for operation in program:
        _rename(operation, same)
        if not facts(operation.function).shares_memory or len(operation.inputs) != 1:
            kept.append(operation)
            continue
        (source,) = operation.slots
        below = root.get(source, source)
        root.update({slot: below for _, slot in operation.outputs})
        if below == 0 or any(
            metas[slot].kind[2:] != metas[below].kind[2:] for _, slot in operation.outputs
        ):
            kept.append(operation)
            continue
        found[(below, *metas[below].place)] = below
        for _, slot in operation.outputs:
            metas[slot] = metas[slot]._replace(offset=metas[source].offset + shifts.get(slot, 0))
            place = below, *metas[slot].place
            if place in found and slot != output:
                same[slot] = found[place]
            else:
                found[place] = slot
                args = [None, *metas[slot].place]
                kept.append(
                    Operation(
                        _aten.as_strided.default, args, {}, [(args, 0, below)], [(None, slot)]
                    )
                )
    return kept


def _fuse_products(program: list[Operation], metas: list[Meta], output: int) -> list[Operation]:
    """``x + A B`` in one operation, where nothing else needs ``A B``."""
    # before: m = A @ B; y = x + m
    # after: y = addmm(x, A, B). Gain: 2 to 5 % of dense layers' products.
    uses = Counter([output, *(slot for operation in program for slot in operation.slots)])
    products = {op.outputs[0][1]: op for op in program if op.function in _MATMUL_AND_ADD}
    for operation in program:
        if (
            operation.function is not _aten.add.Tensor
            or operation.kwargs
            or len(operation.args) != 2
        ):
            continue
        for place, position, slot in reversed(operation.inputs):
            product = products.get(slot)
            same_layout = metas[slot].kind == metas[operation.outputs[0][1]].kind
            if product is None or not same_layout or place is not operation.args or uses[slot] > 1:
                continue
            added = operation.args[1 - position]
            added_slots = [s for _, key, s in operation.inputs if key == 1 - position]
            operation.function = _MATMUL_AND_ADD[product.function]
            operation.args = [added, *product.args]
            inputs = [(operation.args, 0, s) for s in added_slots]
            operation.inputs = inputs + [
                (operation.args, key + 1, s) for _, key, s in product.inputs
            ]
            break
    return program


def _reuse_memory(
    program: list[Operation], metas: list[Meta], output: int, sharing: Sharing
) -> None:
    """Let a pointwise operation, or a fused product, write its result over an argument that ends there."""

    def memory(slot: int) -> int:
        return sharing.of(metas[slot].memory)

    # before: y = tanh_backward(g, h), and g is freed after it
    # after: tanh_backward(g, h, grad_input=g). Gain: 15 % of an MLP's product, 5 % of a
    # transformer's: no new pages from the allocator.
    end = len(program)
    last = {
        memory(slot): i
        for i, op in enumerate(program)
        for slot in [*op.slots, *(s for _, s in op.outputs)]
    }
    last |= {memory(0): end, memory(output): end}
    for index, operation in enumerate(program):
        fused = operation.function in _FUSED
        if (
            operation.writes
            or operation.kwargs
            or not (fused or facts(operation.function).pointwise)
        ):
            continue
        variant, result = find_out_variant(operation.function), operation.outputs[0][1]
        meta = metas[result]
        used = Counter(memory(slot) for slot in operation.slots)
        for place, position, slot in operation.inputs:
            over = memory(slot)
            # Nothing may need the argument's memory later, nor this operation twice.
            ends_here = last[over] == index and used[over] == 1
            alike = metas[slot].kind == meta.kind and metas[slot].offset == meta.offset
            if (
                variant is None
                or not (ends_here and alike)
                or place is not operation.args
                or (fused and position != 0)
            ):
                continue
            operation.function, name = variant
            operation.kwargs = {name: None}
            operation.inputs = [*operation.inputs, (operation.kwargs, name, slot)]
            last[over] = last[memory(result)]
            sharing.join(memory(result), over)
            break
