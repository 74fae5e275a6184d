"""Run a recorded pull-back with the samples kept apart.

A pull-back ``u ↦ Jᵀu`` sums over samples in a few places only: where a weight's gradient is a matrix product of
activations and sensitivities, or a bias's gradient a sum. So the pull-back of ``u = 1`` holds every row of ``J``, and
they are had for the price of one by keeping the terms of these sums apart. Which operations sum over samples is not
looked up but measured: an operand belongs to the samples along a dimension if ``u = w``, another weight for each
sample, multiplies its slices by these weights. It does not matter how the outputs are computed: by layers, by
``torch.func``, or with derivatives in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngd_optim.curvature import pull_back
from ngd_optim.parameters import FlatParameters
from ngd_optim.recording import Operation, Recorder, Sharing, note_last_uses, without_dead_code

_aten = torch.ops.aten
# By operation, for each operand that may hold the sensitivities: the dimension that it is summed over.
_SUMMED_OPERANDS: dict[Any, dict[int, int]] = {
    _aten.mm.default: {0: 1, 1: 0},
    _aten.bmm.default: {0: 2, 1: 1},
    _aten.mv.default: {0: 1, 1: 0},
    _aten.dot.default: {0: 0, 1: 0},
}
_SUMS = {_aten.sum.dim_IntList, _aten.sum.default}
_TRANSPOSES = {_aten.t.default, _aten.transpose.int}
_ADDITIONS = {_aten.add.Tensor, _aten.add_.Tensor}


class NotLocalError(RuntimeError):
    """The rows of the Jacobian cannot be told apart."""


@dataclass(frozen=True)
class _Whole:
    """A value that the samples have in common so far, at ``u = 1`` and at ``u = w``."""

    at_ones: Tensor
    at_weights: Tensor


@dataclass(frozen=True)
class _Apart:
    """A value for each sample, shape (samples, *shape)."""

    values: Tensor


@dataclass(frozen=True)
class _Outer:
    """A matrix for each sample, as the product ``left rightᵀ`` of (samples, rows, k) and (samples, columns, k)."""

    left: Tensor
    right: Tensor

    @property
    def values(self) -> Tensor:
        return self.left @ self.right.mT


_Value = _Whole | _Apart | _Outer


class Samples:
    """Runs a recorded pull-back with the samples kept apart."""

    def __init__(self, outputs: Sequence[Tensor], parameters: FlatParameters) -> None:
        u = torch.cat([torch.ones_like(z).reshape(-1) for z in outputs])
        self._outputs = outputs
        self._parameters = parameters
        recorder = Recorder(u)
        with torch.no_grad(), recorder:
            pieces = [
                piece.view(z.shape) for z, piece in zip(outputs, u.split([z.numel() for z in outputs]), strict=True)
            ]
            gradients = pull_back(outputs, parameters.tensors)(pieces)
        self._metas = recorder.metas
        self._slots = [recorder.slot_of(gradient) for gradient in gradients]
        wanted = [slot for slot in self._slots if slot is not None]
        self._program = without_dead_code(recorder.program, recorder.metas, wanted, Sharing())
        note_last_uses(self._program, wanted)

    def fill(self, rows: Tensor, *, in_one_pass: bool = False) -> None:
        """Write all rows of the Jacobian; in one pass for each output, or else in one for each element of a sample."""
        start = 0
        for z in self._outputs:
            block = rows[start : start + z.numel()]
            try:
                self._fill_samples(block, start, 1)
            except NotLocalError:  # the elements of a row of z have a sample in common
                if in_one_pass or z.ndim < 2 or z.shape[0] in (1, z.numel()):
                    raise
                self._fill_samples(block, start, z.numel() // z.shape[0])
            start += z.numel()

    def _fill_samples(self, block: Tensor, start: int, components: int) -> None:
        for component in range(components):
            self._run(block[component::components], start + component, components)

    @torch.no_grad()
    def _run(self, block: Tensor, start: int, stride: int) -> None:
        """Fill the rows of one output element of each sample."""
        count = len(block)
        size = self._metas[0].shape[0]
        where = torch.arange(start, start + count * stride, stride, device=block.device)
        self._weights = torch.linspace(1, 2, count, dtype=block.dtype, device=block.device)
        dtype = self._metas[0].dtype
        at_ones = torch.zeros(size, dtype=dtype, device=block.device)
        at_weights = at_ones.clone()
        at_ones[where], at_weights[where] = 1, self._weights.to(dtype)
        values: dict[int, Any] = {0: _Whole(at_ones, at_weights)}
        for operation in self._program:
            inputs = {slot: values[slot] for slot in operation.slots}
            results = self._result(operation, inputs)
            for index, slot in operation.outputs:
                values[slot] = results if index is None or results is None else results[index]
            for slot in operation.last_uses:
                values.pop(slot, None)
        first = 0
        for p, slot in zip(self._parameters.tensors, self._slots, strict=True):
            part = block[:, first : first + p.numel()]
            self._write(part, None if slot is None else values[slot])
            first += p.numel()

    def _write(self, part: Tensor, value: _Value | None) -> None:
        if value is None:
            return
        if isinstance(value, _Whole):
            raise NotLocalError("a sum over samples was not found")
        if isinstance(value, _Outer) and value.left.dtype == part.dtype:
            shape = (len(part), value.left.shape[1], value.right.shape[1])
            torch.bmm(value.left, value.right.mT, out=part.unflatten(1, shape[1:]))
        else:
            part.copy_(value.values.reshape(len(part), -1))

    def _result(self, operation: Operation, inputs: dict[int, _Value | None]) -> Any:
        """What an operation makes of its inputs; None stands for zero, and a list for several results."""
        known = [value for value in inputs.values() if value is not None]
        if not known:
            return None
        if all(isinstance(value, _Whole) for value in known):
            apart = self._taken_apart(operation, inputs)
            return self._of_whole(operation, inputs) if apart is None else apart
        if any(isinstance(value, _Whole) for value in known):
            raise NotLocalError(f"{operation.function} mixes sums over samples with what is not summed")
        return self._of_apart(operation, inputs)

    def _of_whole(self, operation: Operation, inputs: dict[int, Any]) -> Any:
        ones, weights = (
            _call(operation, {s: self._zeros(s) if v is None else getattr(v, name) for s, v in inputs.items()})
            for name in ("at_ones", "at_weights")
        )
        if isinstance(ones, Tensor):
            return _whole(ones, weights)
        return [_whole(a, b) for a, b in zip(ones, weights, strict=True)]

    def _of_apart(self, operation: Operation, inputs: dict[int, Any]) -> Any:
        """Linear operations after the sum over samples, on each sample's term."""
        values = [inputs[slot] for slot in operation.slots]
        outer = all(isinstance(value, _Outer) for value in values)
        if outer and operation.function in _TRANSPOSES:
            return _Outer(values[0].right, values[0].left)
        if operation.function in _ADDITIONS and not operation.kwargs and len(values) == 2:
            if None in values:
                (value,) = (value for value in values if value is not None)
                if len({self._metas[slot].shape for slot in operation.slots}) == 1:
                    return value
            elif outer:
                return _Outer(*(torch.cat([getattr(v, side) for v in values], 2) for side in ("left", "right")))
        if operation.writes and operation.function not in _ADDITIONS:
            raise NotLocalError(f"{operation.function} writes to memory after the sum over samples")
        slots = list(inputs)
        dims = [None if inputs[slot] is None else 0 for slot in slots]
        tensors = [self._zeros(slot) if inputs[slot] is None else inputs[slot].values for slot in slots]
        function = _aten.add.Tensor if operation.writes else operation.function

        def one(*parts: Tensor) -> Any:
            return _call(operation, dict(zip(slots, parts, strict=True)), function)

        result = torch.vmap(one, in_dims=tuple(dims))(*tensors)
        return _Apart(result) if isinstance(result, Tensor) else [_Apart(part) for part in result]

    def _taken_apart(self, operation: Operation, inputs: dict[int, Any]) -> _Value | None:
        """The terms of a sum over samples; None if the operation is none."""
        if len(operation.inputs) != 1 or operation.writes:
            return None
        (place, position, slot), function = operation.inputs[0], operation.function
        value = inputs[slot]
        if place is not operation.args:
            return None
        if function in _SUMS:
            return self._terms_of_sum(operation, value)
        dim = _SUMMED_OPERANDS.get(function, {}).get(position)
        sample = None if dim is None else self._samples(value, dim)
        if sample is None:
            return None
        ours, theirs = value.at_ones.movedim(dim, 0), operation.args[1 - position]
        theirs = theirs.movedim(_SUMMED_OPERANDS[function][1 - position], 0)
        if function is _aten.mm.default:
            sides = [self._by_sample(sample, t).movedim(1, 2) for t in (ours, theirs)]
            return _Outer(*sides) if position == 0 else _Outer(*reversed(sides))
        if function is _aten.bmm.default:
            left, right = (ours, theirs) if position == 0 else (theirs, ours)
            return self._added(sample, left.unsqueeze(3) * right.unsqueeze(2))
        return self._added(sample, ours * theirs if ours.ndim == theirs.ndim else _times_rows(ours, theirs))

    def _terms_of_sum(self, operation: Operation, value: _Whole) -> _Value | None:
        x = value.at_ones
        dims = operation.args[1] if len(operation.args) > 1 else None
        dims = [dim % max(x.ndim, 1) for dim in dims] if dims else list(range(x.ndim))
        for dim in dims:
            sample = self._samples(value, dim)
            if sample is not None:
                keeps_dims = len(operation.args) > 2 and operation.args[2]
                terms = x.movedim(dim, 0).unsqueeze(dim + 1)
                others = [d + 1 for d in dims if d != dim]
                terms = terms.sum(others, keepdim=True) if others else terms
                kept = [size for d, size in enumerate(x.shape) if d not in dims]
                return self._added(sample, terms if keeps_dims else terms.reshape(len(terms), *kept))
        return None

    def _samples(self, value: _Whole, dim: int) -> Tensor | None:
        """For each slice along a dimension, the sample that it belongs to; None if one belongs to several."""
        ones, weighted = (t.movedim(dim, 0).reshape(t.shape[dim], -1) for t in (value.at_ones, value.at_weights))
        squares = (ones * ones).sum(1)
        factors = (ones * weighted).sum(1) / squares.where(squares > 0, 1)
        last = len(self._weights) - 1
        sample = ((factors - 1) * last).round().long().clamp(0, last)
        exact = torch.where(squares > 0, self._weights[sample].to(ones.dtype), factors)
        error = (weighted - exact.unsqueeze(1) * ones).norm()
        return sample if error <= torch.finfo(ones.dtype).eps ** 0.5 * ones.norm() else None

    def _added(self, sample: Tensor, terms: Tensor) -> _Apart:
        total = torch.zeros(len(self._weights), *terms.shape[1:], dtype=terms.dtype, device=terms.device)
        return _Apart(total.index_add_(0, sample, terms))

    def _by_sample(self, sample: Tensor, rows: Tensor) -> Tensor:
        """Rows → shape (samples, most rows that one has, columns), filled with zeros."""
        counts = torch.bincount(sample, minlength=len(self._weights))
        order = torch.argsort(sample, stable=True)
        number = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts)[sample[order]]
        result = torch.zeros(len(counts), int(counts.max()), rows.shape[1], dtype=rows.dtype, device=rows.device)
        result[sample[order], number] = rows[order]
        return result

    def _zeros(self, slot: int) -> Tensor:
        meta = self._metas[slot]
        return torch.zeros(meta.shape, dtype=meta.dtype, device=self._parameters.device)


def _whole(ones: Tensor | None, weights: Tensor | None) -> _Whole | None:
    if ones is None or weights is None or not (ones.any() or weights.any()):
        return None  # zero would look like a sum over samples along every dimension
    return _Whole(ones, weights)


def _times_rows(a: Tensor, b: Tensor) -> Tensor:
    """A matrix and a vector, in either order, that are summed over the first dimension of both."""
    return a * b.unsqueeze(1) if a.ndim > b.ndim else a.unsqueeze(1) * b


def _call(operation: Operation, values: dict[int, Tensor], function: Any = None) -> Any:
    """Run an operation with values in its slots."""
    for place, key, slot in operation.inputs:
        place[key] = values[slot]
    try:
        return (function or operation.function)(*operation.args, **operation.kwargs)
    finally:
        for place, key, _ in operation.inputs:
            place[key] = None
