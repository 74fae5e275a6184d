"""What a closure changes beside its result: random number generators and buffers."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ngd_optim.torch_internals import memory_of


class SideEffects:
    """Things that a closure changes, put back before it runs again, so that many runs have the effect of the first one.

    Dropout masks and sampled noise then agree between the runs, and running statistics move once a
    step.

    Args:
        devices: whose global random number generators belong to it, the CPU's always.
        parameters: what is moved from outside, and left alone.
    """

    def __init__(self, devices: Iterable[torch.device], parameters: Iterable[Tensor] = ()) -> None:
        self._devices = {d for d in devices if d.type != "cpu"}
        self._apart = {memory_of(p) for p in parameters}
        self._tracked: dict[int, tuple[Any, Callable[[], Tensor], Callable[[Tensor], Any]]] = {}
        self._start: dict[int, Tensor] = {}
        self._after: dict[int, Tensor] | None = None

    def track_generator(self, generator: torch.Generator) -> None:
        """The closure is about to draw from a generator."""
        self._track(generator, generator.get_state, generator.set_state)

    def track_tensor(self, tensor: Tensor) -> None:
        """The closure is about to change a tensor in place."""
        if memory_of(tensor) in self._apart:
            return
        # Through .data, or autograd would take it for a change of what the graph has saved.
        self._track(tensor, lambda: tensor.detach().clone(), lambda value: tensor.data.copy_(value))

    def _track(
        self, thing: Any, read: Callable[[], Tensor], write: Callable[[Tensor], Any]
    ) -> None:
        if id(thing) not in self._tracked:
            self._tracked[id(thing)] = (thing, read, write)
            self._start[id(thing)] = read()
            if self._after is not None:  # made in the first run, and about to change in another
                self._after[id(thing)] = self._start[id(thing)]

    def begin(self) -> None:
        """Before the first run: note where the generators are. Tensors are noted when they are about to change."""
        self._track(torch.default_generator, torch.get_rng_state, torch.set_rng_state)
        for device in self._devices:
            module = torch.get_device_module(device)
            self._track(
                device,
                partial(module.get_rng_state, device),
                partial(module.set_rng_state, device=device),
            )

    @property
    def tensors(self) -> list[Tensor]:
        """Those that it changes."""
        return [thing for thing, _, _ in self._tracked.values() if isinstance(thing, Tensor)]

    def rewind(self) -> None:
        """Put everything back to where the first run found it."""
        if self._after is None:
            self._after = {key: read() for key, (_, read, _) in self._tracked.items()}
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
