"""Compute nothing again that is still in memory.

A curvature product pushes a tangent through the model, and with it goes the same forward pass that the traced run has
just made, on the same values. That run's graph has saved most of them. A :class:`Memory` watches the traced run, and a
:class:`Recall` answers the operations of the second one with what the first has left. What nobody has kept is computed
when it is needed, and mostly it is not.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ngd_optim.recording.aten import Mode, facts, tensors_of, written

WORTH_REMEMBERING = 2**16
"""In bytes. What is smaller is computed sooner than found."""


class _Layout(NamedTuple):
    """How a tensor lies in its storage."""

    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor_in(self, storage: torch.UntypedStorage) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)  # pyright: ignore


@dataclass
class _Result:
    """A tensor that an operation gave: its index in the result or None, what it held, and where it was."""

    index: int | None
    contents: int
    storage: StorageWeakRef
    layout: _Layout


@dataclass
class _Promise:
    """An operation that was put off, and the storages that wait for its results."""

    function: Any
    args: Any
    kwargs: Any
    waiting: list[tuple[_Result, StorageWeakRef]]


class Memory(Mode):
    """A context for the first run. It keeps nothing alive.

    What a storage holds has a number, the same wherever it was computed by the same operations from the same contents.

    Attributes:
        results: what operations gave, by their :meth:`origin`.
        functions: the operations among them.
        operations: how many gave something new.
        bytes: how much that was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mark = object()
        self._numbers: dict[Any, int] = {}
        self._draws = 0
        self.results: dict[Any, list[_Result]] = {}
        self.functions: set[Any] = set()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = facts(func)
        if known.shares_memory:
            return func(*args, **kwargs)
        self._draws += known.random
        if known.in_place:
            origin = self.origin(func, args, kwargs, self._draws)
            result = func(*args, **kwargs)
            self.note_writes(func, args, kwargs, origin)
            return result
        result = func(*args, **kwargs)
        outputs = tensors_of(result)
        sizes = [t.numel() * t.itemsize for _, t in outputs]
        self.operations, self.bytes = self.operations + 1, self.bytes + sum(sizes)
        if max(sizes, default=0) >= WORTH_REMEMBERING:
            self._remember(self.origin(func, args, kwargs, self._draws), outputs, result)
        return result

    def origin(self, func: Any, args: Any, kwargs: Any, draws: int) -> Any:
        """What an operation computes, as something that can be compared; ``draws`` counts the random ones so far."""
        described = self._described(args), self._described(list(kwargs.items()))
        return func, draws if facts(func).random else 0, described

    def contents(self, storage: torch.UntypedStorage) -> int:
        """The number of what a storage holds, a new one if it is seen for the first time."""
        return storage._contents[1] if self._knows(storage) else self.hold(storage, self._number(object()))  # pyright: ignore

    def hold(self, storage: torch.UntypedStorage, contents: int) -> int:
        """Note what a storage holds."""
        storage._contents = self._mark, contents  # pyright: ignore[reportAttributeAccessIssue]
        return contents

    def note_writes(self, func: Any, args: Any, kwargs: Any, origin: Any) -> None:
        """Note what storages hold after an operation in place."""
        for place, tensor in enumerate(written(func, args, kwargs)):
            self.hold(tensor.untyped_storage(), self._number((origin, place)))

    def find(self, result: _Result) -> Tensor | None:
        """A tensor that an operation gave, if its storage still holds the same."""
        storage = torch.UntypedStorage._new_with_weak_ptr(result.storage.cdata)
        if storage is None or self.contents(storage) != result.contents:
            return None
        return result.layout.tensor_in(storage)

    def _remember(self, origin: Any, outputs: list[tuple[int | None, Tensor]], result: Any) -> None:
        complete = outputs[0][0] is None or (isinstance(result, tuple) and len(outputs) == len(result))
        if complete and all(_plain(t) and not self._knows(t.untyped_storage()) for _, t in outputs):
            self.functions.add(origin[0])
            self.results[origin] = [
                _Result(
                    index,
                    self.hold(t.untyped_storage(), self._number((origin, index))),
                    StorageWeakRef(t.untyped_storage()),
                    _Layout(int(t.storage_offset()), t.shape, t.stride(), t.dtype, t.device),
                )
                for index, t in outputs
            ]

    def _knows(self, storage: torch.UntypedStorage) -> bool:
        return getattr(storage, "_contents", (None,))[0] is self._mark

    def _number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = value.storage_offset(), value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()
            return self.contents(value.untyped_storage()), place
        if isinstance(value, list | tuple):
            return tuple([self._described(part) for part in value])
        return repr(value)  # 1, 1.0 and True are not the same argument, nor are 0.0 and -0.0


class Recall(Mode):
    """A context for the second run, or the part of another context that computes.

    Args:
        memory: of the first run.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory
        self._draws = 0
        self._promises: dict[int, _Promise] = {}
        self._lent: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives."""
        fact, memory = facts(func), self._memory
        if fact.shares_memory or fact.asks_about_shapes:
            return func(*args, **kwargs)
        self._draws += fact.random
        if not (fact.in_place or func in memory.functions):
            self.fulfil(args, kwargs)
            return func(*args, **kwargs)
        origin = memory.origin(func, args, kwargs, self._draws)
        known = memory.results.get(origin, [])
        if known and not fact.random:
            return self._recalled(func, args, kwargs, known)
        self.fulfil(args, kwargs)
        if fact.in_place and any(t.untyped_storage()._cdata in self._lent for t in written(func, args, kwargs)):
            raise RuntimeError(f"{func} changes in place what it did not change when the closure ran before")
        result = func(*args, **kwargs)
        if fact.in_place:
            memory.note_writes(func, args, kwargs, origin)
        for entry in known:  # drawn again, for the generator's sake
            drawn = result if entry.index is None else result[entry.index]
            memory.hold(drawn.untyped_storage(), entry.contents)
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.fulfil_all()

    def fulfil_all(self) -> None:
        """Compute what was put off and has outlived the run."""
        self._forget_unneeded()
        while self._promises:
            self._keep(next(iter(self._promises.values())))

    def fulfil(self, *values: Any) -> None:
        """Compute what was put off and stands among some values, nested ones too."""
        if not self._promises:
            return
        for value in values:
            if isinstance(value, Tensor):
                promise = self._promises.get(value.untyped_storage()._cdata)
                if promise is not None:
                    self._keep(promise)
            elif isinstance(value, list | tuple):
                self.fulfil(*value)
            elif isinstance(value, dict):
                self.fulfil(*value.values())

    def _recalled(self, func: Any, args: Any, kwargs: Any, known: list[_Result]) -> Any:
        promise = _Promise(func, args, kwargs, [])
        tensors = []
        for entry in known:
            tensor = self._memory.find(entry)
            if tensor is None:
                layout = entry.layout
                tensor = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=layout.device)
                storage = tensor.untyped_storage()
                self._memory.hold(storage, entry.contents)
                self._promises[storage._cdata] = promise
                promise.waiting.append((entry, StorageWeakRef(storage)))
            else:
                self._lent.add(tensor.untyped_storage()._cdata)
            tensors.append(tensor)
        self._forget_unneeded()
        return tensors[0] if known[0].index is None else tuple(tensors)

    def _forget_unneeded(self) -> None:
        """Where nobody waits any more, let the arguments go, for which others may wait: the last come first."""
        for address in reversed(list(self._promises)):
            if all(storage.expired() for _, storage in self._promises[address].waiting):
                del self._promises[address]

    def _keep(self, promise: _Promise) -> None:
        self.fulfil(promise.args, promise.kwargs)
        result = promise.function(*promise.args, **promise.kwargs)
        for entry, reference in promise.waiting:
            self._promises.pop(reference.cdata, None)
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                tensor = entry.layout._replace(offset=0).tensor_in(storage)
                tensor.copy_(result if entry.index is None else result[entry.index])


def _plain(tensor: Tensor) -> bool:
    strided = type(tensor) is Tensor and tensor.layout == torch.strided
    return strided and not (tensor._is_zerotensor() or tensor.is_conj() or tensor.is_neg())
