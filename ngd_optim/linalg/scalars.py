"""The scalars of an iteration: Python's where reading a value is free, 0-dim tensors where it waits for a device.

An algorithm that takes its scalars from one of these classes, combines them by operators and
:meth:`choose`, and looks at them every ``look_every`` rounds runs on both. Between looks it does
not know whether it has converged: a zero factor leaves a vector as it is.
"""

from typing import Any

import torch
from torch import Tensor

from ngd_optim.reading import read

Scalar = Any
"""A number or a truth value: Python's, or a 0-dim tensor."""


class OnHost:
    """Python's numbers."""

    look_every = 1

    @staticmethod
    def dot(a: Tensor, b: Tensor) -> Scalar:
        """``aᵀb``."""
        return torch.dot(a, b).item()

    @staticmethod
    def choose(condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
        """``a`` where the condition holds, else ``b``."""
        return a if condition else b

    @staticmethod
    def read(*values: Scalar) -> list[int]:
        """Whole numbers, for the host."""
        return [int(value) for value in values]

    @staticmethod
    def is_seen_to_vanish(v: Tensor) -> bool:
        """Whether a vector is zero."""
        return not v.any()

    @staticmethod
    def add(y: Tensor, x: Tensor, factor: Scalar) -> None:
        """``y += factor · x``; if the factor is 0, whatever ``x`` holds, ``y`` stays as it is."""
        if factor:
            y.add_(x, alpha=factor)


class OnDevice:
    """Tensors: the device computes them when it comes to it, and the host waits only when it looks."""

    look_every = 8

    @staticmethod
    def dot(a: Tensor, b: Tensor) -> Scalar:
        """As :meth:`OnHost.dot`."""
        return torch.dot(a, b)

    @staticmethod
    def choose(condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
        """As :meth:`OnHost.choose`."""
        return torch.where(condition, a, b)

    @staticmethod
    def read(*values: Scalar) -> list[int]:
        """As :meth:`OnHost.read`."""
        if not any(isinstance(value, Tensor) for value in values):
            return OnHost.read(*values)
        return [int(number) for number in read(*values)]

    @staticmethod
    def is_seen_to_vanish(v: Tensor) -> bool:
        """No: looking is a wait, and multiplying zeros is none."""
        return False

    @staticmethod
    def add(y: Tensor, x: Tensor, factor: Scalar) -> None:
        """As :meth:`OnHost.add`."""
        # 0 · inf is NaN: what a stopped solve must not add is taken out before it is multiplied.
        y.addcmul_(torch.where(factor != 0, x, 0.0), factor)


def choose_scalars(device: torch.device) -> type[OnHost] | type[OnDevice]:
    """What suits vectors on a device."""
    return OnHost if device.type == "cpu" else OnDevice
