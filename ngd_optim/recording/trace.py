"""What a closure did in a run, to be compared with another run, and where its results lie."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngd_optim.aten import facts
from ngd_optim.program import Operation

_PLAIN = (Tensor, torch.nn.Parameter)
_VALUES = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size, type)
_DEEP = 8
"""So many levels of a returned object are described."""


class Source(NamedTuple):
    """A tensor in a run's memory.

    Attributes:
        memory: its number.
        offset: how many elements it begins after the first tensor there.
        shape, stride, dtype: of the tensor.
    """

    memory: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a tensor lies, without holding it: its storage, and where it begins there, in elements."""

    storage: "weakref.ref[torch.UntypedStorage]"
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Place":
        """That of a tensor."""
        return cls(weakref.ref(tensor.untyped_storage()), int(tensor.storage_offset()))


@dataclass(slots=True)
class _Memory:
    """A piece of a storage.

    Attributes:
        storage: it.
        offset: of the first tensor there, in elements.
        begin, end: the piece, in bytes.
    """

    storage: torch.UntypedStorage
    offset: int
    begin: int
    end: int


class Trace:
    """What a closure did in a run, and the memory in which its results and what it was given lie.

    Args:
        parameters: of which it computed them.
        operations: in their order.
        places: of the first slot in each piece of memory that they made, and of the parameters.
        cuts: in their order, why autograd does not follow what was computed.
        about: what tells, beside the operations, which product it is: tensors, numbers and objects
            that hold them.

    Attributes:
        signature: two runs have the same product, up to what their memory holds, if this is the same.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        operations: Sequence[Operation],
        places: dict[int, Place],
        cuts: Sequence[str],
        about: Any,
    ) -> None:
        self._memories: dict[int, _Memory] = {}
        self._at: dict[int, list[int]] = {}  # the numbers by address of the storage
        for number, place in places.items():
            storage = place.storage()
            if storage is not None and storage.nbytes():
                self._memories[number] = _Memory(storage, place.offset, 0, storage.nbytes())
                self._at[storage.data_ptr()] = [number]
        self.signature: list[Any] = [
            [self._describe_tensor(p) for p in parameters],
            [self._describe_operation(operation) for operation in operations],
            list(cuts),
            self._describe(about, _DEEP),
        ]

    def find(self, tensor: Tensor) -> Source | None:
        """Where a tensor lies; None if that is not memory of the run, or not in a way that is followed."""
        if not is_plain(tensor) or tensor.is_conj() or tensor.is_neg():
            return None
        begin, end = _bytes_of(tensor)
        for number in self._at.get(tensor.untyped_storage().data_ptr(), ()):
            memory = self._memories[number]
            if memory.begin <= begin and end <= memory.end:
                offset = int(tensor.storage_offset()) - memory.offset
                return Source(number, offset, tensor.shape, tensor.stride(), tensor.dtype)
        return None

    def get(self, source: Source) -> Tensor | None:
        """The tensor at that place in this run; None if the memory is gone."""
        memory = self._memories.get(source.memory)
        if memory is None:
            return None
        offset = memory.offset + source.offset
        reach = sum((n - 1) * s for n, s in zip(source.shape, source.stride, strict=True))
        # set_ would make room for what reaches beyond the storage.
        end = (offset + reach + 1) * source.dtype.itemsize
        if offset < 0 or end > memory.storage.nbytes():
            return None
        empty = torch.empty(0, dtype=source.dtype, device=memory.storage.device)
        return empty.set_(memory.storage, offset, source.shape, source.stride)

    def _describe_operation(self, operation: Operation) -> Any:
        if operation.expected is None and not facts(operation.function).replayable:
            return object()  # its shape, or what it draws, is another each time
        where = {(id(place), key): slot for place, key, slot in operation.inputs}
        where |= {(id(place), key): (slot,) for place, key, slot in operation.held}

        def describe(place: Any) -> Any:
            items = place.items() if isinstance(place, dict) else enumerate(place)
            return [
                (key, where[id(place), key])
                if (id(place), key) in where
                else (key, describe(value))
                if isinstance(value, list)
                else (key, self._describe(value, 1))
                for key, value in items
            ]

        kwargs = operation.kwargs and describe(operation.kwargs)
        return operation.function, describe(operation.args), kwargs, operation.expected

    def _describe_tensor(self, tensor: Tensor) -> Any:
        """How a tensor lies, and with which others it shares memory."""
        if not is_plain(tensor):
            return object()
        looks = tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
        looks += tensor.is_conj(), tensor.is_neg()
        if not tensor.numel():
            return looks
        storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
        begin, end = _bytes_of(tensor)
        numbers = self._at.setdefault(storage.data_ptr(), [])
        met = [
            n for n in numbers if self._memories[n].begin < end and begin < self._memories[n].end
        ]
        if len(met) > 1:
            return object()  # whose memory it is cannot be told
        if met:
            (number,), memory = met, self._memories[met[0]]
            memory.begin, memory.end = min(begin, memory.begin), max(end, memory.end)
        else:
            number = -1 - len(self._memories)
            numbers.append(number)
            memory = self._memories[number] = _Memory(storage, offset, begin, end)
        return number, offset - memory.offset, looks

    def _describe(self, value: Any, depth: int) -> Any:
        """Something that is equal for what has the same effect; to no other, where that cannot be told."""
        if isinstance(value, Tensor):
            return self._describe_tensor(value)
        if isinstance(value, _VALUES) or type(value).__module__ == "torch":
            return type(value), value
        if depth == 0:
            return object()
        if isinstance(value, list | tuple):
            return type(value), [self._describe(part, depth - 1) for part in value]
        if isinstance(value, dict):
            return [(key, self._describe(part, depth - 1)) for key, part in value.items()]
        if hasattr(value, "__dict__") and not callable(value):
            return type(value), self._describe(vars(value), depth - 1)
        return object()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what its memory holds, laid out by strides."""
    return type(tensor) in _PLAIN and tensor.layout == torch.strided


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins and ends in its storage."""
    begin, size = int(tensor.storage_offset()), tensor.element_size()
    if not tensor.numel():
        return begin * size, begin * size
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * size, (begin + reach + 1) * size
