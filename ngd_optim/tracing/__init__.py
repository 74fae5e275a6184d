"""The user's closure: run, seen, and undone."""

from ngd_optim.tracing.closure import (
    Evaluation,
    TracedClosure,
    list_closures,
)
from ngd_optim.tracing.mode import LossWatch

__all__ = [
    "Evaluation",
    "LossWatch",
    "TracedClosure",
    "list_closures",
]
