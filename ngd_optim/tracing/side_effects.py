"""What a closure changes beside its result: random number generators and buffers."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class SideEffects:
    """Things that a closure changes, put back before each run, so that many runs have the effect of the first one.

    Dropout masks and sampled noise then agree between the gradient, the curvature and every trial
    point, and running statistics move once a step.

    Args:
        devices: whose global random number generators belong to it, the CPU's always.

    Attributes:
        changes_buffers: whether the closure changes tensors in place, other than gradients.
        layouts: strides of what dropout and the like were given in the first run, call by call.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = {d for d in devices if d.type != "cpu"}
        self._tracked: dict[int, tuple[Any, Callable[[], Tensor], Callable[[Tensor], Any]]] = {}
        self._start: dict[int, Tensor] = {}
        self._after: dict[int, Tensor] | None = None
        self.changes_buffers = False
        self.layouts: list[tuple[int, ...]] = []

    @property
    def is_known(self) -> bool:
        """Whether the closure has run once, so that all that it changes has been seen."""
        return self._after is not None

    def track_generator(self, generator: torch.Generator) -> None:
        """The closure is about to draw from a generator."""
        self._track(generator, generator.get_state, generator.set_state)

    def track_tensor(self, tensor: Tensor, *, is_gradient: bool) -> None:
        """The closure is about to change a tensor in place."""
        self.changes_buffers |= not is_gradient
        # Through .data, or autograd would take it for a change of what the graph has saved.
        self._track(tensor, lambda: tensor.detach().clone(), lambda value: tensor.data.copy_(value))

    def _track(
        self, thing: Any, read: Callable[[], Tensor], write: Callable[[Tensor], Any]
    ) -> None:
        if id(thing) not in self._tracked:
            self._tracked[id(thing)] = (thing, read, write)
            self._start[id(thing)] = read()

    def rewind(self, *, tensors: bool = True) -> None:
        """Put everything back to where the first run found it; before that run, note where it is.

        Without ``tensors`` only the generators: inside ``torch.func`` no tensor from outside can be
        written to.
        """
        # At the first run nothing is known: generators are noted now, tensors when they are about
        # to change.
        if self._tracked:
            self._write(self._start, tensors)
            return
        self._track(torch.default_generator, torch.get_rng_state, torch.set_rng_state)
        for device in self._devices:
            module = torch.get_device_module(device)
            self._track(
                device,
                partial(module.get_rng_state, device),
                partial(module.set_rng_state, device=device),
            )

    def settle(self, *, tensors: bool = True) -> None:
        """After a run: put everything to where the first run left it."""
        if self._after is None:
            self._after = {key: read() for key, (_, read, _) in self._tracked.items()}
        else:
            self._write(self._after, tensors)

    @torch.no_grad()
    def _write(self, values: dict[int, Tensor], tensors: bool) -> None:
        for key, value in values.items():
            thing, _, write = self._tracked[key]
            if tensors or not isinstance(thing, Tensor):
                write(value)
