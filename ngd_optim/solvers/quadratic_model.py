"""The quadratic model of the objective around the current parameters, and a step as that model sees it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ngd_optim.linalg.cg import CGResult
from ngd_optim.step.trust_region import TrustRegion, trust_region_scale


@dataclass(frozen=True)
class QuadraticModel:
    """``m(d) = gᵀd + ½ dᵀ(F + W) d``; the linear system adds the damping: ``(F + W + λI) d = b``, ``b = −g``.

    Attributes:
        gradient: ``g``, flat, that of the weight decay included.
        curvature: ``v ↦ F v``, flat to flat, a new tensor at each call.
        decay: ``W``, the weight decay: one number or a flat vector.
        damping: ``λ``, likewise.
        centre: where the damping pulls to, zero if None: ``½ (d − centre)ᵀ λ (d − centre)`` is added to ``m``.
    """

    gradient: Tensor
    curvature: Callable[[Tensor], Tensor]
    decay: float | Tensor
    damping: float | Tensor
    centre: Tensor | None = None

    @property
    def right_side(self) -> Tensor:
        """``b = −g + λ centre``."""
        return -self.gradient if self.centre is None else self.damping * self.centre - self.gradient

    @property
    def shift(self) -> Tensor:
        """``W + λ`` as a flat vector."""
        return torch.zeros_like(self.gradient) + self.decay + self.damping

    def system(self, v: Tensor) -> Tensor:
        """``(F + W + λI) v``."""
        shift = self.decay + self.damping
        product = self.curvature(v)
        return product.addcmul_(shift, v) if isinstance(shift, Tensor) else product.add_(v, alpha=shift)


@dataclass(frozen=True)
class Step:
    """A step ``d`` with what the model says of any fraction of it.

    Attributes:
        direction: ``d``, flat.
        scale: what the trust region made of the solution of the system, ``lr`` not counted.
        slope: ``gᵀd``.
        metric: ``dᵀF d``.
        bend: that again where ``F`` is curvature of the objective too; 0 where it measures the KL alone.
        decay_slope, decay_quadratic: ``θᵀW d`` and ``dᵀW d``.
        products: how many curvature products it took to know all this.
    """

    direction: Tensor
    scale: float
    slope: float
    metric: float
    bend: float
    decay_slope: float
    decay_quadratic: float
    products: int

    def predicted_decrease(self, fraction: float) -> float:
        """What the model says that the objective falls by."""
        return -(fraction * self.slope + 0.5 * fraction**2 * (self.bend + self.decay_quadratic))

    def kl(self, fraction: float) -> float:
        """The second-order model of the KL, ``½ |dᵀF d|``."""
        return 0.5 * fraction**2 * abs(self.metric)

    def decay_change(self, fraction: float) -> float:
        """What the weight-decay term ``½ θᵀW θ`` changes by."""
        return fraction * self.decay_slope + 0.5 * fraction**2 * self.decay_quadratic


def scaled_step(
    model: QuadraticModel,
    solution: CGResult,
    theta: Tensor,
    lr: float | Tensor,
    max_kl: float | None,
    trust_region: TrustRegion,
    measures_kl: bool,
) -> Step:
    """The solution of the system, scaled to the trust region and by ``lr``.

    A step to the edge of a region in KL solves a problem with a linear objective (Schulman et al. 2015, equation 14):
    ``x`` gives its direction, and where the quadratic model with ``F`` has its minimum says nothing of the objective.

    ``dᵀF d`` comes from CG's own scalars; it costs one more product only where ``lr`` differs between groups.
    """
    x = solution.solution
    share = torch.dot(x, (model.decay + model.damping) * x).item()
    metric = solution.x_dot_ax - share
    # A difference of two numbers is known to their rounding only, and a boundary step could be huge. Where F has
    # negative curvature the region is that of |F|, as for the solve, which has gone to the boundary by itself.
    size = max(abs(metric), 16 * torch.finfo(x.dtype).eps * abs(share))
    kind = "clip" if solution.stop == "negative_curvature" else trust_region
    scale = trust_region_scale(solution.x_dot_ax if kind == "damped" else size, max_kl, kind)
    direction = (scale * lr) * x
    quadratic = (
        torch.dot(direction, model.curvature(direction)).item()
        if isinstance(lr, Tensor)
        else (scale * lr) ** 2 * metric
    )
    return Step(
        direction=direction,
        scale=scale,
        slope=torch.dot(model.gradient, direction).item(),
        metric=quadratic,
        bend=0.0 if measures_kl and kind != "clip" else quadratic,
        decay_slope=torch.dot(theta, model.decay * direction).item(),
        decay_quadratic=torch.dot(direction, model.decay * direction).item(),
        products=int(isinstance(lr, Tensor)),
    )
