"""Record what a linear map does to a vector, once, and replay it on others.

A curvature product runs the model in forward mode, weighs, and pulls back. Only a part of that work depends on the
vector: the rest, the primal pass above all, is the same for every product at a point. The recording keeps the aten
operations that depend on the vector, with everything else as constants.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ngd_optim.program import Meta, Operation, optimised

_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
_NOT_REPLAYABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}


# The shape of the result depends on values, but of the index or mask, not of what is indexed.
_BY_CONSTANTS = {torch.ops.aten.index.Tensor, torch.ops.aten.masked_select.default}


class CannotReplayError(RuntimeError):
    """An operation that depends on the vector would not do the same again."""


class Recording:
    """``v ↦ function(v)`` for a linear function of a flat vector, replayed without its code, autograd or primal pass.

    Args:
        function: linear; everything that it uses beside the vector must stay as it is while the recording is used.
        v: the vector that it is recorded on.

    Attributes:
        result: ``function(v)``, computed on the way.

    Raises:
        CannotReplayError: an operation on the vector is random, writes to other memory or reads the vector's values.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], v: Tensor) -> None:
        recorder = Recorder(v)
        with torch.no_grad(), recorder:
            self.result = function(v)
        self._slots = len(recorder.metas)
        self._output = recorder.slot_of(self.result)
        self._program = [] if self._output is None else optimised(recorder.program, recorder.metas, self._output)

    @torch.no_grad()
    def __call__(self, v: Tensor) -> Tensor:
        """The function's value at another vector."""
        if self._output is None:
            return torch.zeros_like(self.result)  # linear, and the same for every vector
        values: list[Any] = [None] * self._slots
        values[0] = v
        for operation in self._program:
            for place, key, slot in operation.inputs:
                place[key] = values[slot]
            result = operation.function(*operation.args, **operation.kwargs)
            for place, key, _ in operation.inputs:
                place[key] = None
            for index, slot in operation.outputs:
                values[slot] = result if index is None else result[index]
            for slot in operation.last_uses:
                values[slot] = None
        return values[self._output]


class Recorder(TorchDispatchMode):
    """Notes the operations that depend on one tensor. Every tensor that does has a numbered slot.

    It holds none of them: they are freed as they would be without a recording.
    """

    def __init__(self, v: Tensor) -> None:
        super().__init__()
        self._slot = WeakTensorKeyDictionary()
        self._memory = _MemoryNumbers()
        self.program: list[Operation] = []
        self.metas: list[Meta] = []
        self._new_slot(v)

    def slot_of(self, tensor: Tensor) -> int | None:
        """The slot of a tensor, None if it does not depend on the vector."""
        return self._slot.get(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs: list[tuple[Any, Any, int]] = []
        own_args = self._own(list(args), inputs)
        own_kwargs = self._own(dict(kwargs), inputs)
        if not inputs:
            return func(*args, **kwargs)
        if not (func in _BY_CONSTANTS and all(place is own_args and key == 0 for place, key, _ in inputs)):
            self._check(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _ALIASES:
            self._slot[result] = self._slot[args[0]]
            return result
        outputs = [(None, result)] if isinstance(result, Tensor) else list(_tensors(result))
        slots = [(index, self._new_slot(tensor)) for index, tensor in outputs]
        self.program.append(Operation(func, own_args, own_kwargs, inputs, slots))
        return result

    def _own(self, place: Any, inputs: list[tuple[Any, Any, int]]) -> Any:
        """A copy of nested arguments with the tensors that depend on the vector taken out, and their places noted."""
        for key, value in list(place.items() if isinstance(place, dict) else enumerate(place)):
            if isinstance(value, Tensor):
                slot = self._slot.get(value)
                if slot is not None:
                    inputs.append((place, key, slot))
                    place[key] = None
            elif isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
                place[key] = self._own(list(value), inputs)
        return place

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        if not _NOT_REPLAYABLE.isdisjoint(func.tags):
            raise CannotReplayError(f"{func} is random, or reads values that depend on the vector")
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = args[index] if index < len(args) else kwargs.get(argument.name)
                    for tensor in [written] if isinstance(written, Tensor) else written or []:
                        if not self._memory.known(tensor):
                            raise CannotReplayError(
                                f"{func} writes what depends on the vector to memory from elsewhere"
                            )

    def _new_slot(self, tensor: Tensor) -> int:
        if tensor not in self._slot:
            self._slot[tensor] = len(self.metas)
            flags = (tensor.is_conj(), tensor.is_neg())
            self.metas.append(Meta(tensor.shape, tensor.stride(), tensor.dtype, flags, self._memory.number(tensor)))
        return self._slot[tensor]


class _MemoryNumbers:
    """A number for each piece of memory that depends on the vector; never the same for two, unlike an address."""

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count = 0

    def known(self, tensor: Tensor) -> bool:
        """Whether it has a number."""
        reference, _ = self._numbers.get(tensor.untyped_storage()._cdata, (None, 0))
        return reference is not None and not reference.expired()

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's memory, a new one if it has none."""
        storage = tensor.untyped_storage()
        if not self.known(tensor):
            self._numbers[storage._cdata] = (StorageWeakRef(storage), self._count)
            self._count += 1
        return self._numbers[storage._cdata][1]


def _tensors(result: Any) -> Iterator[tuple[int, Tensor]]:
    for index, value in enumerate(result if isinstance(result, list | tuple) else ()):
        if isinstance(value, Tensor):
            yield index, value
