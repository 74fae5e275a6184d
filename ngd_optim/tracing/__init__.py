"""The user's closure: run, seen, and undone."""

from ngd_optim.tracing.closure import (
    Closure,
    Evaluation,
    ReplayedClosure,
    replayed,
    rewound_on_error,
    twice_differentiable,
)
from ngd_optim.tracing.least_squares import least_squares

__all__ = [
    "Closure",
    "Evaluation",
    "ReplayedClosure",
    "least_squares",
    "replayed",
    "rewound_on_error",
    "twice_differentiable",
]
