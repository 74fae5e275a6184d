"""How far to go along a step: shrink it until the objective falls enough."""

import math
from collections.abc import Callable
from dataclasses import dataclass

SUFFICIENT_DECREASE = 1e-4
"""Share of the first-order decrease that a step must reach (Armijo; Nocedal & Wright, equation 3.4)."""


@dataclass(frozen=True)
class Trial:
    """Where a line search ended: the last point that it tried.

    Attributes:
        fraction: the point is ``fraction`` of the way along the direction; 0 if none was tried.
        objective: objective there; NaN if none was tried.
        kl: measured KL there; None if the metric cannot tell.
        backtracks: points turned down, and systems solved again.
        accepted: whether the point passed.
        overshot: whether a point was turned down for its objective, or nothing finite was there to
            try: what speaks against the quadratic model. A KL a little above its bound, at the
                region's edge, does not.
        problem: what speaks against the point; empty where it passed.
        forgets: whether the step ended before it began, by data that give no finite numbers: the
            optimizer is to go on as if they had not been there.
    """

    fraction: float
    objective: float
    kl: float | None
    backtracks: int
    accepted: bool
    overshot: bool
    problem: str = ""
    forgets: bool = False

    @property
    def reason(self) -> str:
        """One sentence on the outcome."""
        if not self.fraction:
            return f"rejected: {self.problem}"
        if self.accepted:
            return (
                f"accepted after {_count_things(self.backtracks, 'backtrack')}"
                if self.backtracks
                else "accepted"
            )
        return f"rejected after {_count_things(self.backtracks, 'trial point')}, the last one because {self.problem}"

    @classmethod
    def refuse(cls, why: str, *, forgets: bool = False) -> "Trial":
        """A step that is not worth a trial."""
        return cls(0.0, math.nan, None, 0, False, True, why, forgets)


def line_search(
    evaluate: Callable[[float], tuple[float, float | None]],
    objective: float,
    slope: float,
    *,
    max_kl: float | None,
    max_backtracks: int,
    backtrack_ratio: float,
    requires_decrease: bool = True,
) -> Trial:
    """Shrink a step until the objective falls enough and the KL is at most ``max_kl``.

    Args:
        evaluate: ``fraction ↦ (objective, kl)`` at that fraction of the step; a KL of None is not
            tested.
        objective: its value at fraction 0.
        slope: derivative of the objective along the step, ``gᵀd``; negative for a descent
            direction.
        max_kl: largest KL allowed; None for no limit.
        max_backtracks: how often to shrink.
        backtrack_ratio: factor by which the step shrinks each time.
        requires_decrease: False lets every point pass that is finite.
    """
    if not math.isfinite(objective):
        return Trial.refuse(f"the loss is {objective}")
    if not slope <= 0:
        return Trial.refuse(f"the loss does not fall along the step, its slope is {slope:.3g}")
    trial = Trial.refuse("")
    overshot = False
    for turned_down in range(max_backtracks + 1):
        fraction = backtrack_ratio**turned_down
        found, kl = evaluate(fraction)
        target = (
            # f(θ + s d) ≤ f(θ) + c s gᵀd (Armijo).
            objective + SUFFICIENT_DECREASE * fraction * slope if requires_decrease else math.inf
        )
        problem = _find_problem(found, kl, objective, target, max_kl if requires_decrease else None)
        if problem is None:
            return Trial(fraction, found, kl, turned_down, True, overshot)
        # A KL above its bound does not speak against the quadratic model; a loss that rose does.
        overshot |= not (math.isfinite(found) and found <= target)
        trial = Trial(fraction, found, kl, turned_down + 1, False, overshot, problem)
    return trial


def _count_things(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _find_problem(
    objective: float, kl: float | None, start: float, target: float, max_kl: float | None
) -> str | None:
    """What speaks against a point, or None."""
    if not math.isfinite(objective):
        return f"its loss is {objective}"
    if kl is not None and not math.isfinite(kl):
        return f"its KL is {kl}"
    if kl is not None and kl < 0:
        return (
            f"its KL is {kl:.3g}, and a KL is never negative: return another estimate, such as "
            "((r - 1) - r.log()).mean() with r = new probability / old probability"
        )
    if objective > target:
        if objective > start:
            return f"its loss {objective:.6g} is above {start:.6g}"
        # The Armijo bound itself says little: of a steep slope it is far below any loss.
        return (
            f"its loss falls by {start - objective:.3g}, less than {SUFFICIENT_DECREASE:g} of what "
            "the slope promises"
        )
    if max_kl is not None and kl is not None and kl > max_kl:
        return f"its KL {kl:.3g} is above max_kl={max_kl:g}"
    return None
