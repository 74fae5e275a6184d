"""Whether a step tells that there is nothing left to gain."""

import math

import torch

from ngd_optim.linearization import Point
from ngd_optim.settings import Settings
from ngd_optim.step import Outcome

_FAIR = 0.25
"""Reduction ratio above which a model is right enough for ``ftol``, as in scipy."""

_GOOD = 0.5
"""Reduction ratio above which the damping falls."""


def find_convergence(
    point: Point,
    outcome: Outcome,
    settings: Settings,
    *,
    largest_slope: float,
    step_norm: float,
    norm: float,
    damping_was_raised: bool,
) -> str:
    """Which tolerance a step meets, in words; empty if none, or where the data are not finite.

    ``gtol``, ``ftol`` and ``xtol`` are those of ``scipy.optimize.least_squares``. The step is seen
    as if ``lr`` were 1, and a loss that changes by rounding does not change. Where the damping alone
    makes steps short, a good one meets none, for the next one has less; nor does one that is too
    short to be judged, of which :class:`~ngd_optim.advice.Advice` tells, unless rejections have
    raised the damping to there: the loss has come to its rounding.

    Args:
        point: where the step began.
        outcome: where it ended, taken or not.
        settings: of the step.
        largest_slope: ``‖g‖∞``, weight decay included.
        step_norm: of the step that was last tried.
        norm: that of the parameters.
        damping_was_raised: whether the damping is larger than the one that the user chose.
    """
    step, trial, rate = outcome.step, outcome.trial, max(settings.lr)
    if trial.forgets or not rate or outcome.solution.stop in ("indefinite", "not_finite"):
        return ""
    if largest_slope <= settings.gtol:
        return f"no derivative of the loss is above gtol={settings.gtol:g}"
    promised = step.predicted_decrease(trial.fraction or 1.0)
    found = point.value - trial.objective
    is_judged = promised > point.rounding
    ratio = found / promised if is_judged else math.nan
    enough = max(settings.ftol * abs(point.value), point.rounding)
    if max(promised, found) <= enough * rate and (ratio > _FAIR or not is_judged):
        why = f"the loss falls by at most ftol={settings.ftol:g} of it"
    elif step_norm <= settings.xtol * (settings.xtol + norm) * rate:
        why = f"the step is at most xtol={settings.xtol:g} of the parameters"
    else:
        return ""
    with_damping, without = outcome.decreases()
    if is_judged:
        is_held = trial.accepted and ratio > _GOOD and without > max(enough, 2 * with_damping)
    else:
        flat = torch.finfo(point.loss.dtype).eps ** 0.5 * abs(point.value)
        is_held = without > max(enough, flat) and not damping_was_raised
    return "" if is_held else why
