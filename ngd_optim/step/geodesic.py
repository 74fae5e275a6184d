"""Geodesic acceleration: a Gauss-Newton step that follows the bend of its valley.

Along a step ``d`` the residuals move by ``J d + ½ r″``. The second term, their second derivative
along ``d``, is what leads a straight step out of a curved valley. The correction
``a = −½ (F + λ)⁻¹ Jᵀ r″`` takes it back, for one more run of the closure and one more solution with
the same factors (Transtrum & Sethna 2012, sections 2 and 3).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ngd_optim.reading import read
from ngd_optim.solvers import QuadraticModel, RootSolver
from ngd_optim.step.trust_region import Step

_PROBE = 0.1
"""Part of the step at which the residuals are looked at."""

_LARGEST_CORRECTION = 0.75
"""Upper bound on ``2 |a| ÷ |d|`` in the norm of the damping."""


def apply_geodesic_correction(
    step: Step,
    solver: RootSolver,
    model: QuadraticModel,
    theta: Tensor,
    move: Callable[[float], None],
) -> Step | None:
    """The step with its correction; None where that is too large for either to be trusted.

    Slope and curvature remain those of the uncorrected ``d``. Where the residuals cannot be looked
    at, it is the step as it was.

    Args:
        step: a full step, neither scaled nor cut.
        solver: what solved for it, last.
        model: the system that it solved.
        theta: the parameters, flat.
        move: puts the parameters at a fraction of the step.
    """
    d, square_root = step.direction, solver.square_root
    move(_PROBE)
    change = square_root.displaced()
    if change is None:
        return step
    # r(θ + h d) = r + h J d + ½ h² r″: r″ from one difference (Transtrum & Sethna 2012).
    second = 2 / _PROBE * (change / _PROBE - square_root.rows @ d)
    # a = −½ (F + λ)⁻¹ Jᵀ r″.
    a = solver.pull_back(second).mul_(-0.5)
    # Beyond that the expansion is not to be trusted, and the step is too long (the same paper). The host
    # waits: the system is solved again then.
    length_a, length_d = read(*(torch.dot(v, model.shift * v).sqrt() for v in (a, d)))
    if not 2 * length_a <= _LARGEST_CORRECTION * length_d:
        return None
    direction = d + a
    # And for what the line search compares with.
    slope, quadratic = read(*(torch.dot(model.decay * v, direction) for v in (theta, direction)))
    return replace(step, direction=direction, decay_slope=slope, decay_quadratic=quadratic)
