"""Closures that put parameters back where they belong: what is left of a step afterwards."""

from collections.abc import Callable

import torch
from torch import Tensor

from ngd_optim.linearization import Point
from ngd_optim.parameters import FlatParameters

_PUSH, _PROBE = 1e-2, 1e-4
"""How far the base point is pushed, and how far its surroundings are felt, as parts of the parameters' norm.

What leans on a bound is told from what is near it by the push: a tenth of that, or ten times as much, is worse.
"""


class Tangent:
    """``v ↦ P v``: the derivative of what a closure does to its parameters, such as a projection onto bounds.

    It is taken at ``θ − t g``, which is outside of the bounds that the gradient leans on, and inside
    of all others: there the projection is a smooth function. Of what the closure puts back nothing
    is left, and a step is made of the rest (projected Newton: Bertsekas 1982). Each product runs the
    closure once.

    Args:
        point: of a closure that writes to its parameters.
        parameters: they are moved, and put back.
        theta: their values, flat, where the closure has put them.
        gradient: of what is minimised, flat.
    """

    def __init__(
        self,
        point: Point,
        parameters: FlatParameters,
        theta: Tensor,
        gradient: Tensor,
    ) -> None:
        self._point, self._parameters = point, parameters
        norm = theta.norm()
        self._probe = _PROBE * norm.clamp(min=_tiny(theta))
        self._base = theta - (_PUSH * norm / gradient.norm().clamp(min=_tiny(gradient))) * gradient
        self._image = self._put_back(self._base)

    def __call__(self, v: Tensor) -> Tensor:
        """``P v``."""
        length = v.norm().clamp(min=_tiny(v))
        moved = self._put_back(self._base + (self._probe / length) * v)
        return (moved - self._image) * (length / self._probe)

    def project(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``v ↦ P F P v``."""
        return lambda v: self(product(self(v)))

    def _put_back(self, values: Tensor) -> Tensor:
        """Where the closure puts the parameters, if they are there when it begins."""
        now = self._parameters.read()
        with self._parameters.displaced(now, values - now, 1.0):
            self._point.measure()
            return self._parameters.read()


def _tiny(v: Tensor) -> float:
    return torch.finfo(v.dtype).tiny
