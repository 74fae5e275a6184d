"""A program in memory of its own, in which the vector and the constants are put before it runs."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a program reads a constant: a list or dict of arguments, the index or key, and the constant's number."""

    arguments: Any
    key: Any
    number: int


class Prepared(ABC):
    """Such a program, of a :class:`Plan`.

    Args:
        v: a vector like those that will come.

    Attributes:
        vector: where the vector is put.
        places: where it reads constants, which it holds as long as the recording lives that they are of.
    """

    is_costly = False
    """Whether it is kept while other programs of the closure are used."""

    def __init__(self, v: Tensor) -> None:
        self.vector = v.clone(memory_format=torch.contiguous_format)
        self.places: list[Place] = []
        self._of: Any = None

    def __call__(self, v: Tensor, recording: Any, constants: Sequence[Tensor]) -> Tensor:
        """The function's value for a vector and the constants of a recording, a new tensor."""
        if self._of is None or self._of() is not recording:
            self.take(constants)
            places = self.places  # a reference to this would be a circle
            self._of = weakref.ref(recording, lambda _: _fill(places, None))
        self.vector.copy_(v)
        return self.replay()

    def take(self, constants: Sequence[Tensor]) -> None:
        """Read these constants from now on."""
        _fill(self.places, constants)

    @abstractmethod
    def replay(self) -> Tensor:
        """What the program gives for the vector and the constants that are there, a new tensor."""


def _fill(places: Sequence[Place], constants: Sequence[Tensor] | None) -> None:
    for arguments, key, number in places:
        arguments[key] = None if constants is None else constants[number]


class CannotPrepareError(RuntimeError):
    """A program cannot be had in this way; the message says why, if anyone wants to know."""
