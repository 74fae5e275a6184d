"""The user's closure: run, seen, and undone."""

from ngd_optim.tracing.closure import (
    Evaluation,
    TracedClosure,
    wrap_closures,
)
from ngd_optim.tracing.mode import LossWatch

__all__ = [
    "Evaluation",
    "LossWatch",
    "TracedClosure",
    "wrap_closures",
]
