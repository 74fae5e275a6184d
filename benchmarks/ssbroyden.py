"""The self-scaled Broyden method, dense: a peer for physics-informed networks.

Formulas: Al-Baali, Spedicato & Maggioni (2014), Broyden's quasi-Newton methods for a nonlinear system of equations and
unconstrained optimization; Urbán, Stefanou & Pons (2025), Unveiling the optimization process of physics-informed neural
networks, whose choice of the two parameters this is. The line search is torch's, with strong Wolfe conditions.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe  # pyright: ignore[reportPrivateUsage]

Evaluate = Callable[[Tensor], tuple[float, Tensor]]


class SSBroyden:
    """Minimise a function of a flat vector, a step at a time.

    Args:
        evaluate: ``x ↦`` value and gradient.
        start: ``x₀``.
    """

    def __init__(self, evaluate: Evaluate, start: Tensor) -> None:
        self._evaluate, self.x = evaluate, start.clone()
        self.value, self.gradient = evaluate(self.x)
        self._H = torch.eye(len(start)).to(start)
        self._is_first = True

    def step(self) -> bool:
        """One line search and one update of the inverse Hessian; False where it finds no better point."""
        d = -self._H @ self.gradient
        slope = torch.dot(self.gradient, d)
        if not slope < 0:
            return False
        length = min(1.0, 1 / self.gradient.abs().sum().item()) if self._is_first else 1.0

        def along(x: Tensor, t: float, d: Tensor) -> tuple[float, Tensor]:
            return self._evaluate(x + t * d)

        value, gradient, t, _ = _strong_wolfe(
            along, self.x, length, d, self.value, self.gradient, slope
        )
        if not (math.isfinite(value) and value < self.value):
            return False
        s, y = t * d, gradient - self.gradient
        if torch.dot(s, y) > 0:
            self._update(s, y, -t * torch.dot(s, self.gradient).item())
        self.x, self.value, self.gradient, self._is_first = self.x + s, value, gradient, False
        return True

    def _update(self, s: Tensor, y: Tensor, sBs: float) -> None:
        ys = torch.dot(y, s)
        Hy = self._H @ y
        yHy = torch.dot(y, Hy)
        b, h = sBs / ys.item(), (yHy / ys).item()
        a = max(h * b - 1, 1e-300)  # at least 0, by Cauchy and Schwarz
        c = math.sqrt(a / (1 + a))
        rho = min(1.0, h * (1 - c))
        theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b))
        sigma = 1 + a * theta
        root = sigma ** (-1 / (len(s) - 1)) if sigma > 0 else 1.0
        first = min(1.0, 1 / b)
        tau = first * min(root, 1 / theta) if theta > 0 else min(first * root, sigma)
        phi = (1 - theta) / (1 + a * theta)
        v = yHy.sqrt() * (s / ys - Hy / yHy)
        if not (tau > 0 and math.isfinite(phi)):
            tau, phi = 1.0, 1.0  # BFGS
        self._H -= torch.outer(Hy, Hy / yHy)
        self._H += phi * torch.outer(v, v)
        self._H /= tau
        self._H += torch.outer(s, s / ys)
