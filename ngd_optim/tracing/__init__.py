"""The user's closure: run, seen, and undone."""

from ngd_optim.tracing.closure import (
    Evaluation,
    TracedClosure,
    wrap_closures,
)
from ngd_optim.tracing.mode import LossWatch
from ngd_optim.tracing.own_losses import least_squares, variational_energy

__all__ = [
    "Evaluation",
    "LossWatch",
    "TracedClosure",
    "least_squares",
    "variational_energy",
    "wrap_closures",
]
