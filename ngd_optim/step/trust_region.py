"""The trust region: how large it is, and a step that keeps to it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_optim.linalg import LinearSolution
from ngd_optim.names import MaxKL, TrustRegion
from ngd_optim.reading import read
from ngd_optim.solvers import QuadraticModel

DEFAULT_MAX_KL = 0.01
"""In nats per sample: what TRPO uses (Schulman et al. 2015, section 8)."""


def choose_max_kl(max_kl: MaxKL, kind: TrustRegion, has_kl: bool) -> float | None:
    """The trust region's size for a closure, which may return something whose KL can be measured.

    Raises:
        ValueError: a step to the boundary is asked for where there is no default boundary.
    """
    if max_kl != "auto":
        return max_kl
    if kind != "clip" and not has_kl:
        raise ValueError(
            f"trust_region='{kind}' needs a number for max_kl: the closure returns neither a "
            "distribution nor a KL, and a bound in the unit of its loss has no default"
        )
    return DEFAULT_MAX_KL if has_kl else None


def trust_region_scale(quadratic: float, max_kl: float | None, kind: TrustRegion) -> float:
    """Factor ``s`` for a direction ``x`` so that ``½ (s x)ᵀF (s x) ≤ max_kl``.

    Args:
        quadratic: ``xᵀF x``; for ``"damped"`` ``xᵀ(F + λI) x``.
        max_kl: the trust region's size δ, in nats per sample; None for no trust region.
        kind: ``"clip"`` shrinks only a direction that leaves the region; ``"boundary"`` always goes
            to its edge (TRPO: Schulman et al. 2015, appendix C), as does ``"damped"``.
    """
    if max_kl is None or quadratic <= 0:
        return 1.0
    # ½ s² xᵀF x = δ.
    to_boundary = math.sqrt(2 * max_kl / quadratic)
    return min(1.0, to_boundary) if kind == "clip" else to_boundary


@dataclass(frozen=True)
class Step:
    """A step ``d`` with what the model says of any fraction of it.

    Attributes:
        direction: ``d``, flat.
        scale: what the trust region made of the solution of the system, ``lr`` not counted.
        slope: ``gᵀd``.
        slope_of_solution: that before the trust region, ``gᵀ(lr · x)``.
        metric: ``dᵀF d``.
        objective_curvature: that again where ``F`` is curvature of the objective too; 0 where it
            measures the KL alone.
        decay_slope, decay_quadratic: ``θᵀW d`` and ``dᵀW d``.
        products: how many curvature products it took to know all this.
        problem: what speaks against trying it, where more damping can make it shorter.
    """

    direction: Tensor
    scale: float
    slope: float
    slope_of_solution: float
    metric: float
    objective_curvature: float
    decay_slope: float
    decay_quadratic: float
    products: int
    problem: str = ""

    def predicted_decrease(self, fraction: float) -> float:
        """What the model says that the objective falls by."""
        return -(
            fraction * self.slope
            + 0.5 * fraction**2 * (self.objective_curvature + self.decay_quadratic)
        )

    def kl(self, fraction: float) -> float:
        """The second-order model of the KL, ``½ |dᵀF d|``."""
        return 0.5 * fraction**2 * abs(self.metric)

    def decay_change(self, fraction: float) -> float:
        """What the weight-decay term ``½ θᵀW θ`` changes by."""
        return fraction * self.decay_slope + 0.5 * fraction**2 * self.decay_quadratic


def scale_step(
    model: QuadraticModel,
    solution: LinearSolution,
    theta: Tensor,
    lr: float | Tensor,
    max_kl: float | None,
    trust_region: TrustRegion,
    measures_kl: bool,
) -> Step:
    """The solution of the system, scaled to the trust region and by ``lr``.

    A step to the edge of a region in KL solves a problem with a linear objective (Schulman et al.
    2015, equation 14): ``x`` gives its direction, and where the quadratic model with ``F`` has its
    minimum says nothing of the objective.

    ``dᵀF d`` comes from CG's own scalars; it costs one more product only where ``lr`` differs
    between groups.
    """
    x = solution.solution

    def along(v: Tensor) -> list[Tensor]:
        return [torch.dot(w, v) for w in (model.gradient, model.decay * theta, model.decay * v)]

    # The host waits once a solution: the length of the step depends on these.
    damping_part, *of_x = read(torch.dot(x, (model.decay + model.damping) * x), *along(x))
    # xᵀF x = xᵀA x − xᵀ(W + λ)x.
    metric = solution.x_dot_ax - damping_part
    # A difference of two numbers is known to their rounding only, and a boundary step could be
    # huge. Where F has negative curvature the region is that of |F|, as for the solve, which has
    # gone to the boundary by itself.
    size = max(abs(metric), 16 * torch.finfo(x.dtype).eps * abs(damping_part))
    kind = "clip" if solution.stop == "negative_curvature" else trust_region
    scale = trust_region_scale(solution.x_dot_ax if kind == "damped" else size, max_kl, kind)
    direction = (scale * lr) * x
    if isinstance(lr, Tensor):
        product = torch.dot(direction, model.curvature(direction))
        slope, decay_slope, decay_quadratic, quadratic = read(*along(direction), product)
    else:  # d is a multiple of x
        first, second = scale * lr, (scale * lr) ** 2
        slope, decay_slope, decay_quadratic = first * of_x[0], first * of_x[1], second * of_x[2]
        quadratic = second * metric
    return Step(
        direction=direction,
        scale=scale,
        slope=slope,
        slope_of_solution=slope / scale,
        metric=quadratic,
        objective_curvature=0.0 if measures_kl and kind != "clip" else quadratic,
        decay_slope=decay_slope,
        decay_quadratic=decay_quadratic,
        products=int(isinstance(lr, Tensor)),
    )
