"""What a closure changes beside its result: random number generators and buffers."""

from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ngd_optim.torch_internals import is_transformed, memory_of

_Thing = tuple[Any, Callable[[], Tensor], Callable[[Tensor], Any]]
"""Something that changes, what reads it and what writes it."""


class SideEffects:
    """Things that a closure changes, put back before it runs again, so that many runs have the effect of the first one.

    Dropout masks and sampled noise then agree between the runs, and running statistics move once a
    step. What the closure does not touch is left alone: another thread may be using it.

    Args:
        devices: whose global random number generators belong to it, the CPU's always.
        parameters: what is moved from outside, and left alone.
    """

    def __init__(self, devices: Iterable[torch.device], parameters: Iterable[Tensor] = ()) -> None:
        self._parameters = list(parameters)
        self._tracked: dict[int, _Thing] = {}
        self._start: dict[int, Tensor] = {}
        self._after: dict[int, Tensor] | None = None
        self._global: list[_Thing] = [
            (torch.default_generator, torch.get_rng_state, torch.set_rng_state)
        ]
        for device in {d for d in devices if d.type != "cpu"}:
            module = torch.get_device_module(device)
            get, put = module.get_rng_state, module.set_rng_state
            self._global.append((device, partial(get, device), partial(put, device=device)))
        self._before: list[Tensor] = []
        self._left: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Before the first run: note where the global generators are; tensors are noted before they change."""
        self._before = [read() for _, read, _ in self._global]

    def end(self) -> None:
        """After the first run: note where it has left tensors, before others write to them."""
        self._left = {
            key: read()
            for key, (thing, read, _) in self._tracked.items()
            if isinstance(thing, Tensor)
        }

    def track_generator(self, generator: torch.Generator | None) -> None:
        """The closure is about to draw from a generator; None: from a global one."""
        if generator is None:
            # From where it was at the beginning: the closure may have seeded it since.
            for (thing, read, write), start in zip(self._global, self._before, strict=True):
                self._track(thing, read, write, start)
        else:
            self._track(generator, generator.get_state, generator.set_state)

    @cached_property
    def _apart(self) -> set[int]:
        return {memory_of(p) for p in self._parameters}

    def track_tensor(self, tensor: Tensor) -> None:
        """The closure is about to change a tensor in place."""
        # What belongs to a transform of torch.func ends with it.
        if is_transformed([tensor]) or memory_of(tensor) in self._apart:
            return
        # Through .data, or autograd would take it for a change of what the graph has saved.
        self._track(tensor, lambda: tensor.detach().clone(), lambda value: tensor.data.copy_(value))

    def _track(
        self,
        thing: Any,
        read: Callable[[], Tensor],
        write: Callable[[Tensor], Any],
        start: Tensor | None = None,
    ) -> None:
        if id(thing) not in self._tracked:
            now = read() if start is None else start
            self._tracked[id(thing)] = (thing, read, write)
            self._start[id(thing)] = now
            if self._after is not None:  # made in the first run, and about to change in another
                self._after[id(thing)] = now

    @property
    def tensors(self) -> list[Tensor]:
        """Those that it changes."""
        return [thing for thing, _, _ in self._tracked.values() if isinstance(thing, Tensor)]

    def rewind(self) -> None:
        """Put everything back to where the first run found it."""
        if self._after is None:
            # Generators are read where the closure runs again, or not at all: other threads draw from them.
            self._after = {
                key: self._left[key] if key in self._left else read()
                for key, (_, read, _) in self._tracked.items()
            }
        self._write(self._start)

    def settle(self) -> None:
        """Put everything to where the first run left it."""
        if self._after is not None:  # it ran again
            self._write(self._after)

    @torch.no_grad()
    def _write(self, values: dict[int, Tensor]) -> None:
        for key, value in values.items():
            _, _, write = self._tracked[key]
            write(value)
