"""The step of a constrained update: a linear objective and a linear constraint within a trust region."""

import math
from typing import Literal, NamedTuple

Case = Literal["free", "active", "recovery"]

_ROUNDING = 1e-10
"""Below this share of it, what is left of a gradient's square beside the constraint's direction is rounding."""


class ConstrainedStep(NamedTuple):
    """The minimum of ``gᵀd`` subject to ``bᵀd + c ≤ 0`` and ``½ dᵀA d ≤ δ`` (Achiam et al. 2017, equation 11).

    It is ``d = along_g · A⁻¹g + along_b · A⁻¹b``.

    Attributes:
        case: ``"free"``, the constraint holds without being asked for; ``"active"``, the step ends
            where ``bᵀd + c = 0``; ``"recovery"``, no step in the region satisfies the constraint, and
            this one lowers ``bᵀd`` most.
        along_g, along_b: the factors.
        multiplier: the constraint's, ``ν``; 0 where it is free, infinite for recovery.
    """

    case: Case
    along_g: float
    along_b: float
    multiplier: float


def solve_constrained(q: float, r: float, s: float, c: float, delta: float) -> ConstrainedStep:
    """The step, in closed form.

    A linear objective has its minimum on the region's edge. So the constraint is free if the step
    without it satisfies it. Else it is active, and the rest of the region's radius is for the part
    of the gradient that does not change it.

    Args:
        q: ``gᵀA⁻¹g``.
        r: ``gᵀA⁻¹b``.
        s: ``bᵀA⁻¹b``.
        c: how far the constraint is violated now.
        delta: the region's size ``δ``.
    """
    to_edge = math.sqrt(2 * delta / q) if q > 0 else 0.0
    if s <= 0 or c - to_edge * r <= 0:  # s = 0: no step changes the constraint
        return ConstrainedStep("free", -to_edge, 0.0, 0.0)
    # The nearest point with bᵀd + c = 0 is d = −(c/s) A⁻¹b, where ½ dᵀA d = c²/(2s).
    room = 2 * delta - c * c / s
    if c > 0 and room < 0:
        return ConstrainedStep("recovery", 0.0, -math.sqrt(2 * delta / s), math.inf)
    # g less its part along b, (r/s) b: bᵀA⁻¹ of it is 0, and gᵀA⁻¹ of it is
    left = q - r * r / s
    if left <= _ROUNDING * q:  # both gradients are parallel
        return ConstrainedStep("active", 0.0, -c / s, -r / s)
    tau = math.sqrt(max(room, 0.0) / left)
    return ConstrainedStep(
        "active", -tau, (tau * r - c) / s, (c / tau - r) / s if tau else math.inf
    )
