"""The user's closure: run, seen, and undone."""

from ngd_optim.tracing.closure import (
    Evaluation,
    TracedClosure,
    wrap_closures,
)
from ngd_optim.tracing.least_squares import least_squares
from ngd_optim.tracing.losses import LossCall
from ngd_optim.tracing.mode import LossWatch

__all__ = [
    "Evaluation",
    "LossCall",
    "LossWatch",
    "TracedClosure",
    "least_squares",
    "wrap_closures",
]
