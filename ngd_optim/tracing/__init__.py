"""The user's closure: run, seen, and undone."""

from ngd_optim.tracing.closure import Evaluation, TracedClosure
from ngd_optim.tracing.interface import list_closures, require_real_scalar
from ngd_optim.tracing.mode import LossWatch

__all__ = [
    "Evaluation",
    "LossWatch",
    "TracedClosure",
    "list_closures",
    "require_real_scalar",
]
