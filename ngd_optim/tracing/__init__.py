"""The user's closure: run, seen, and undone."""

from ngd_optim.tracing.closure import (
    Evaluation,
    TracedClosure,
    wrap_closures,
)
from ngd_optim.tracing.least_squares import least_squares

__all__ = [
    "Evaluation",
    "TracedClosure",
    "least_squares",
    "wrap_closures",
]
