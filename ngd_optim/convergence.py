"""Whether a step tells that there is nothing left to gain, and whether a run can come to that."""

import math
from dataclasses import dataclass

import torch

from ngd_optim.linearization import Point
from ngd_optim.settings import Settings
from ngd_optim.step import Outcome

_FAIR = 0.25
"""Reduction ratio above which a model is right enough for ``ftol``, as in scipy."""

_GOOD = 0.5
"""Reduction ratio above which the damping falls."""

_PATIENCE = 100
"""Steps in a row without a lower loss: rejections raise the damping over all of its range in thirty."""


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


@dataclass(frozen=True)
class Progress:
    """Whether a run on the same data still goes down. A step replaces it."""

    lowest: float = math.inf
    """The lowest loss so far."""
    still: int = 0
    """How many steps in a row have not lowered it."""

    def after(self, loss: float, *, is_new_data: bool) -> "Progress":
        """One step further, which ended at a loss; other data begin anew."""
        if is_new_data:
            return Progress()
        return Progress(loss) if loss < self.lowest else Progress(self.lowest, self.still + 1)

    def check(self, reason: str) -> None:
        """Raise where a loop until convergence would never end.

        Raises:
            RuntimeError: with the last step's reason.
        """
        if self.still >= _PATIENCE:
            raise RuntimeError(
                f"the loss has not become lower in {self.still} steps, and a loop until "
                f"optimizer.converged would not end; the last step was {reason}. Is the loss finite, "
                "and lr above 0? Steps to the edge of a trust region (trust_region='boundary' or "
                "'damped') do not end at a minimum: use 'clip', or a number of steps"
            )
