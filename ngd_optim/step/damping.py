"""How the damping λ follows the quality of the quadratic model."""

import math
from collections.abc import Sequence
from typing import Any

from ngd_optim.names import DampingLimit

TRUSTED = 0.1
"""Least reduction ratio of a step for which a direct solver looks whether a longer one is as good."""

_GROW_REJECTED = 4.0
_GROW = 2.0
_SHRINK = 1 / 2
_LITTLE, _MUCH = 0.2, 0.4
_STEEP = 1 / 3
_SHARPEN_MOST, _SHARPEN, _SMOOTHEN = 0.25, 0.75, 1.1
_WORTH = 0.05
_SPAN = 1e7
_FLOOR = 1e-2
"""Share of the curvature along a step that λ may always fall to: there it no longer holds the step back."""


def damping_range(
    lowest: DampingLimit,
    highest: DampingLimit,
    *,
    exact: bool,
    at_start: float,
    now: Sequence[float],
) -> tuple[float, float]:
    """The range of the adapted damping; ``"auto"`` leaves it all but open where the system is solved exactly.

    A direct solver is robust to rounding, so λ may become arbitrarily small. The damping has the
    loss's unit: the range is around the one at the start, and what the groups have is in it.
    """
    auto = (1e-30, 1e16) if exact else (1e-8, 1e6)
    given = [value for value in (at_start / _SPAN, *now) if value > 0]
    auto = min(auto[0], *given, auto[0]), max(auto[1], at_start * _SPAN, *now)
    if highest == "auto":
        low = auto[0] if lowest == "auto" else lowest
        return low, max(low, auto[1])
    return min(auto[0], highest) if lowest == "auto" else lowest, highest


class Damping:
    """The damping of the parameter groups in one step.

    Args:
        groups: the parameter groups; only :meth:`adapt` writes their ``damping``.
        adapts: whether it changes.
        lowest: its least value, the setting ``min_damping``.
        highest: its largest value, the setting ``max_damping``.
        at_start: the setting ``damping``.
        exact: whether the system is solved exactly. It is then solved again with more damping where
            a step does not lower the loss, at a small part of the cost, in place of a line search.

    Attributes:
        values: one number per group.
        can_retry: whether more damping and another solution take the place of a line search.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        adapts: bool,
        lowest: DampingLimit,
        highest: DampingLimit,
        exact: bool,
        at_start: float,
    ) -> None:
        self.values = [float(group["damping"]) for group in groups]
        self.can_retry = exact and adapts
        self._groups = groups
        self._adapts = adapts
        self._limits = damping_range(
            lowest, highest, exact=exact, at_start=at_start, now=self.values
        )
        self._exact = exact
        self._is_floor_open = lowest == "auto"
        self._falls = True
        self._is_least = False

    def adapt_to_new_data(self, slope: float) -> None:
        """Before a step; see :func:`new_data_factor`. The step's own data then no longer lower the damping."""
        if self._adapts and not math.isnan(slope):
            self._falls = False
            self._multiply(new_data_factor(slope))

    def lower_floor(self, curvature: float) -> None:
        """Let it fall to a share of the curvature along a step: its least value ``"auto"`` has no unit of the loss's.

        Args:
            curvature: ``dᵀF d / ‖d‖²``.
        """
        if self._is_floor_open and 0 < curvature < math.inf:
            lowest, highest = self._limits
            self._limits = min(lowest, _FLOOR * curvature), highest

    def retry(self, attempt: int) -> bool:
        """After the first, second, … solution that did not lower the loss; False where there is no more to give."""
        before = self.values
        self._multiply(retry_factor(attempt))
        return self.values != before

    def lower(self, attempt: int) -> list[float]:
        """What the first, second, … solution with less damping has; :attr:`values` stay until :meth:`accept`."""
        return self._times(lowering_factor(attempt))

    def accept(self, values: list[float]) -> None:
        """Go on with less."""
        self.values = values

    def refuse(self) -> None:
        """Less was tried, and is too little: the rule after the step does not lower it either."""
        self._is_least = True

    @property
    def can_grow(self) -> bool:
        """Whether :meth:`retry` would change anything."""
        return any(value < self._limits[1] for value in self.values)

    def adapt(self, reduction_ratio: float, *, accepted: bool, overshot: bool) -> None:
        """After a step; see :func:`damping_factor`."""
        if not self._adapts:
            return
        factor = 1.0
        # A direct solver has been solved again already until the loss fell; see `retry`.
        if not self._exact:
            factor = damping_factor(reduction_ratio, accepted=accepted, overshot=overshot)
        elif accepted:
            factor = nielsen_factor(reduction_ratio)
            if self._is_least:
                factor = max(factor, 1.0)
        self._multiply(factor if self._falls else max(factor, 1.0))
        for group, value in zip(self._groups, self.values, strict=True):
            group["damping"] = value

    def _multiply(self, factor: float) -> None:
        self.values = self._times(factor)

    def _times(self, factor: float) -> list[float]:
        lowest, highest = self._limits
        return [min(max(value * factor, lowest), highest) for value in self.values]


def nielsen_factor(reduction_ratio: float) -> float:
    """Factor for the damping after a step of a direct solver that was taken: the rule of Nielsen (1999).

    It falls from 2 at a reduction ratio of 0 to 1/3 at a ratio of 1, smoothly. A step that is
    turned down is taken back and solved anew, with more and more damping; see :func:`retry_factor`.

    Args:
        reduction_ratio: as for :func:`damping_factor`.
    """
    if math.isnan(reduction_ratio):
        return 1.0
    # 1 − (2ρ − 1)³, not below 1/3.
    return max(1 / 3, 1 - (2 * min(reduction_ratio, 1.0) - 1) ** 3)


def retry_factor(attempt: int) -> float:
    """Factor for the damping after the first, second, … solution that did not lower the loss: 2, 4, 8."""
    return 2.0**attempt


def lowering_factor(attempt: int) -> float:
    """Factor for the damping after the first, second, … solution that was good: 1/4, 1/16, 1/64."""
    return 4.0**-attempt


def damping_factor(reduction_ratio: float, *, accepted: bool, overshot: bool) -> float:
    """Factor for the damping after a step: a Levenberg-Marquardt rule (Martens 2010, section 4.1).

    Its factors and thresholds are quicker to lower the damping than the paper's: on rectified
    networks the reduction ratio stays near 0.4 while every step is accepted, and there less damping
    is what gets further.

    Args:
        reduction_ratio: decrease of the objective that was found ÷ decrease that the model
            predicted; NaN if that is too little to tell.
        accepted: whether the step was taken. One that was rejected raises the damping fourfold.
        overshot: whether a longer step was turned down because the model was wrong there; then the
            damping grows.
    """
    if not accepted and (overshot or not math.isnan(reduction_ratio)):
        return _GROW_REJECTED
    if math.isnan(reduction_ratio):
        return 1.0
    if overshot or reduction_ratio < _LITTLE:
        return _GROW
    return _SHRINK if reduction_ratio > _MUCH else 1.0


def smoothing_factor(
    promised: float, hidden: float, reduction_ratio: float, *, accepted: bool
) -> float:
    """Factor for how wide kinks are rounded, after a step.

    A wide rounding lets parameters and residuals pass through zero. A minimum of the rounded loss
    is no better for the loss than what the rounding hides of it. So the width may stay while the
    model promises more than a twentieth of that, and the closer the model is to its minimum, the
    faster the width falls: as in the smoothing methods of Chen (2012), with decreases in place of
    gradients. Where the loss does not fall as promised, it falls as well.

    Args:
        promised: decrease that the model promised for the whole step.
        hidden: how much higher the rounded loss is than the loss, at the step's start.
        reduction_ratio: as for :func:`damping_factor`.
        accepted: likewise.
    """
    if not accepted or reduction_ratio < _LITTLE:
        return _SHARPEN
    reached = promised / (_WORTH * hidden) if hidden > 0 else math.inf
    return min(max(reached, _SHARPEN_MOST**2) ** 0.5, _SMOOTHEN)


def new_data_factor(slope: float) -> float:
    """Factor for the damping where a step meets other data than the last one.

    The reduction ratio is measured on the batch that the step was made for, and does not see that
    it fits that batch's noise. The next batch does, at no cost: its slope along the step is uphill
    where the step was too long. A step that is best for the next batch is too short in the long run
    (Wu, Ren, Liao & Grosse 2018), so a third of the slope before is allowed for.

    Args:
        slope: of the new data along the last step, at its end, ÷ the steepness of the old data at
            its start: -1 where it could have gone on, 0 where it should end, 1 where half of it
            would do.
    """
    return 2.0 ** min(max(slope - _STEEP, -1.0), 1.0)
