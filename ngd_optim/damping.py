"""How the damping λ follows the quality of the quadratic model."""

import math
from typing import Literal

_GROW_REJECTED = 4.0
_GROW = 2.0
_SHRINK = 1 / 2
_LITTLE, _MUCH = 0.2, 0.6


DampingLimit = float | Literal["auto"]


def damping_range(lowest: DampingLimit, highest: DampingLimit, *, exact: bool) -> tuple[float, float]:
    """The range of the adapted damping; ``"auto"`` leaves it all but open where the system is solved exactly.

    What stands between the solution and rounding is then the solver's business, and a model that is right is followed
    to its minimum.
    """
    auto = (1e-30, 1e16) if exact else (1e-8, 1e6)
    return auto[0] if lowest == "auto" else lowest, auto[1] if highest == "auto" else highest


def trust_factor(reduction_ratio: float) -> float:
    """Factor for the damping after a step of a direct solver that was taken: the rule of Nielsen (1999).

    It falls from 2 at a reduction ratio of 0 to 1/3 at a ratio of 1, smoothly. A step that is turned down is taken back
    and solved anew, with more and more damping; see :func:`retry_factor`.

    Args:
        reduction_ratio: as for :func:`damping_factor`.
    """
    if math.isnan(reduction_ratio):
        return 1.0
    return max(1 / 3, 1 - (2 * min(reduction_ratio, 1.0) - 1) ** 3)


def retry_factor(attempt: int) -> float:
    """Factor for the damping after the first, second, … solution that did not lower the loss: 2, 4, 8."""
    return 2.0**attempt


def damping_factor(reduction_ratio: float, *, accepted: bool, overshot: bool) -> float:
    """Factor for the damping after a step: a Levenberg-Marquardt rule (Martens 2010, section 4.1).

    Its factors and thresholds are quicker to lower the damping than the paper's: on rectified networks the reduction
    ratio stays near 0.4 while every step is accepted, and there less damping is what gets further.

    Args:
        reduction_ratio: decrease of the objective that was found ÷ decrease that the model predicted; NaN if that is
            too little to tell.
        accepted: whether the step was taken. One that was rejected raises the damping fourfold.
        overshot: whether a longer step was turned down because the model was wrong there; then the damping grows.
    """
    if not accepted and (overshot or not math.isnan(reduction_ratio)):
        return _GROW_REJECTED
    if math.isnan(reduction_ratio):
        return 1.0
    if overshot or reduction_ratio < _LITTLE:
        return _GROW
    return _SHRINK if reduction_ratio > _MUCH else 1.0
