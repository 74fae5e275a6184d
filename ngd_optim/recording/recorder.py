"""Record what a linear map does to a vector, once, and replay it on others.

Only a part of a curvature product depends on the vector. The rest, the primal pass above all, is
the same for every product at a point. The recording keeps the aten operations that depend on the
vector; everything else is a constant.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ngd_optim.recording.aten import facts, find_written, tensors_of
from ngd_optim.recording.passes import optimise
from ngd_optim.recording.program import (
    CannotReplayError,
    Meta,
    Operation,
    find_last_uses,
    remove_dead_code,
    run,
)
from ngd_optim.torch_internals import DispatchMode, materialize

_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class Recording:
    """``v ↦ function(v)`` for a linear function of a flat vector, as a program that :func:`record` has noted.

    It runs without the function's code, without autograd and without the primal pass.

    Args:
        recorder: has seen the function.
        result: what the function gave.
        optimises: make the program shorter; else :meth:`multiply` can replay it.

    Attributes:
        length: how many operations a replay takes.
        bytes: how much they compute.
    """

    def __init__(self, recorder: "Recorder", result: Tensor, *, optimises: bool) -> None:
        metas = recorder.metas
        self._output = recorder.slot_of(result)
        self._views, self._program, self._last_uses = [], [], ([], [])
        if self._output is not None:
            if optimises:
                self._views, self._program = optimise(recorder.program, metas, self._output)
            else:
                self._program = remove_dead_code(
                    recorder.program, [self._output], lambda slot: metas[slot].memory
                )
            last_uses = find_last_uses([*self._views, *self._program], [self._output])
            self._last_uses = last_uses[: len(self._views)], last_uses[len(self._views) :]
        self._values: list[Any] = [None] * len(metas)
        self.length = len(self._program)
        computed = [op for op in self._program if not facts(op.function).shares_memory]
        self.bytes = sum(metas[slot].bytes for op in computed for _, slot in op.outputs)
        self._seen: tuple[Tensor | None, int] = (None, 0)
        self._zero = torch.zeros_like(result) if self._output is None else None

    @torch.no_grad()
    def __call__(self, v: Tensor) -> Tensor:
        """The function's value at another vector.

        If the same tensor object is passed again (CG updates it in place), its views are reused.
        """
        if self._output is None:
            assert self._zero is not None
            return self._zero.clone()  # linear, and the same for every vector
        if self._seen[0] is not v or self._seen[1] != v.data_ptr():
            self._seen = v, v.data_ptr()
            self._values[0] = v
            run(self._views, self._last_uses[0], self._values)
        # Slots of constants and of the vector's views; the program fills the others.
        values = self._values.copy()
        run(self._program, self._last_uses[1], values)
        return values[self._output]

    @torch.no_grad()
    def multiply(self, rows: Tensor) -> Tensor:
        """The values at several vectors, as rows, by one run of the program with a dimension more.

        The program must be as it was recorded: what is optimised writes where it knows the layout.

        Raises:
            RuntimeError: ``torch.vmap`` does not know an operation.
        """
        output = self._output
        if output is None:
            assert self._zero is not None
            return self._zero.expand(len(rows), -1).clone()

        def replay(v: Tensor) -> Tensor:
            values: list[Any] = [v, *[None] * (len(self._values) - 1)]
            run(self._program, self._last_uses[1], values)
            return values[output]

        return torch.vmap(replay)(rows)


def record(
    function: Callable[[Tensor], Tensor], v: Tensor, *, optimises: bool = True
) -> tuple[Tensor, Recording]:
    """``function(v)``, and what replays the function on other vectors.

    Args:
        function: linear; everything that it uses beside the vector must stay as it is while the
            recording is used.
        v: the vector that it is recorded on.
        optimises: as for :class:`Recording`.

    Raises:
        CannotReplayError: an operation on the vector is random, writes to other memory or reads the
            vector's values.
    """
    v = v.detach()
    recorder = Recorder(v)
    with torch.no_grad(), recorder:
        result = function(v)
    return result, Recording(recorder, result, optimises=optimises)


class Recorder(DispatchMode):
    """Notes the operations that depend on one tensor. Every tensor that does has a numbered slot.

    It holds none of them: they are freed as they would be without a recording. What it notes of
    tensors and storages are attributes of theirs, because dictionaries of weak references take
    longer than the operations.
    """

    def __init__(self, v: Tensor) -> None:
        super().__init__()
        self._mark = object()
        self._memories = 0
        self.program: list[Operation] = []
        self.metas: list[Meta] = []
        self._new_slot(v)

    def slot_of(self, tensor: Tensor) -> int | None:
        """The slot of a tensor, None if it does not depend on the vector."""
        return self._read_mark(tensor, "_slot")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        func = materialize(func)
        fact = facts(func)
        if fact.asks_about_shapes:
            return func(*args, **kwargs)
        inputs: list[tuple[Any, Any, int]] = []
        own_args = take_slots_out(list(args), inputs, self.slot_of)
        own_kwargs = take_slots_out(dict(kwargs), inputs, self.slot_of) if kwargs else {}
        # It does not depend on the vector: its result is a constant of the program.
        if not inputs:
            return func(*args, **kwargs)
        # Autograd detaches what it saves; the alias is the same value, hence the same slot.
        if func in _ALIASES:
            result = func(*args, **kwargs)
            self._put_mark(result, "_slot", inputs[0][2])
            return result
        # An index or a mask may be constant where the indexed tensor is not: that is replayable.
        if not fact.replayable and not (
            fact.by_constants and all(p is own_args and key == 0 for p, key, _ in inputs)
        ):
            raise CannotReplayError(f"{func} is random, or reads values that depend on the vector")
        # Memory from elsewhere would keep what the last replay wrote there.
        if fact.in_place and any(self._memory(t) is None for t in find_written(fact, args, kwargs)):
            raise CannotReplayError(
                f"{func} writes what depends on the vector to memory from elsewhere"
            )
        result = func(*args, **kwargs)
        # squeeze_ and the like give the same tensor another shape: another slot from here on.
        anew = fact.in_place and fact.shares_memory
        slots = [(index, self._new_slot(tensor, anew=anew)) for index, tensor in tensors_of(result)]
        self.program.append(Operation(func, own_args, own_kwargs, inputs, slots))
        return result

    def _new_slot(self, tensor: Tensor, *, anew: bool = False) -> int:
        slot = self.slot_of(tensor)
        if slot is not None and not anew:
            return slot
        # Views share storage: a write through one of them changes the others.
        memory = self._memory(tensor)
        if memory is None:
            memory = self._memories
            self._memories += 1
            self._put_mark(tensor.untyped_storage(), "_memory", memory)
        flags = (tensor.is_conj(), tensor.is_neg())
        offset = int(tensor.storage_offset())
        self.metas.append(Meta(tensor.shape, tensor.stride(), tensor.dtype, flags, offset, memory))
        self._put_mark(tensor, "_slot", len(self.metas) - 1)
        return len(self.metas) - 1

    def _memory(self, tensor: Tensor) -> int | None:
        """A number for each piece of memory that depends on the vector, None for others."""
        return self._read_mark(tensor.untyped_storage(), "_memory")

    def _put_mark(self, thing: Tensor | torch.UntypedStorage, name: str, number: int) -> None:
        setattr(thing, name, (self._mark, number))

    def _read_mark(self, thing: Tensor | torch.UntypedStorage, name: str) -> int | None:
        mark, number = getattr(thing, name, (None, None))
        return number if mark is self._mark else None


def take_slots_out(
    place: Any, inputs: list[tuple[Any, Any, int]], slot_of: Callable[[Tensor], int | None]
) -> Any:
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
