"""Exact solutions of the linear system of a step.

A direct solver keeps all that does not depend on the damping, so that another damping at the same
point costs no new Jacobian.
"""

import logging
import math
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from ngd_optim.jacobian import SqrtGGN
from ngd_optim.linalg import LinearSolution
from ngd_optim.reading import read
from ngd_optim.solvers.quadratic_model import QuadraticModel
from ngd_optim.solvers.refined import RefinedCholesky, gram
from ngd_optim.solvers.solver import RootSolver, Solver

logger = logging.getLogger("ngd_optim")

_LONG = 30.0
"""Seconds. What takes longer than that is told of before it begins."""

_SPEED = {"cpu": 1e10}
"""Operations a second of a modest device; of others than these 1e12."""

_MANY = 256
"""Of so many parameters on Cholesky factors are tried before a QR, which is as quick for fewer."""

_TIMED = 3
"""The product whose time is that of each: the first ones are recorded."""


_told: set[tuple[str, int]] = set()
"""Of which solvers, with how many parameters, it was said that they take long."""


def tell_if_long(name: str, operations: float, like: Tensor, seconds: float = 0.0) -> None:
    """Say in the log, once, that a solver will take long; silence would look as if it hung."""
    total = seconds + operations / _SPEED.get(like.device.type, 1e12)
    if total > _LONG and (name, len(like)) not in _told:
        _told.add((name, len(like)))
        logger.warning(
            "solver=%r takes about %.0f seconds for each step with %s parameters; solver='cg' takes "
            "some products in place of that",
            name,
            total,
            f"{len(like):,}",
        )


class LeastSquares(RootSolver):
    """The damped least-squares problem ``min ‖A x + s‖² + xᵀ(W + λ)x + 2 xᵀrest``, for few parameters.

    By QR: ``A`` is reduced to a triangle once; each damping then costs the QR of that triangle and
    a diagonal, as in MINPACK (Moré 1978). The condition number is that of ``A``, where normal
    equations would square it. Of many parameters that is slow, and
    :class:`~ngd_optim.solvers.refined.RefinedCholesky` comes first.
    """

    name = "dense"

    def __init__(self, root: SqrtGGN) -> None:
        super().__init__(root)
        self._triangle: Tensor | None = None
        self._factor = self._shift = root.rows
        self._refined = RefinedCholesky(root.rows) if root.rows.shape[1] >= _MANY else None
        self._is_refined = False

    def solve(self, model: QuadraticModel) -> LinearSolution:
        """By orthogonal transformations, or so that they would give the same."""
        A, s, _ = self.square_root
        shift, rest = model.shift, _find_remainder(self.square_root, model)
        x, self._shift = None, shift
        if self._refined is not None and self._refined.factor(shift):
            x = self._refined.solve(s, rest)
        self._is_refined = x is not None
        if x is None:
            x = self._solve_by_qr(shift, rest)
        return _solution_from_rows(x, A, model)

    def _solve_by_qr(self, shift: Tensor, rest: Tensor | None) -> Tensor:
        A, s, _ = self.square_root
        n = A.shape[1]
        triangle = self._triangle
        if triangle is None:
            # [A s] = Q R: R has all that min ‖A x + s‖² needs, with n rows in place of m.
            triangle = torch.linalg.qr(torch.cat([A, s.unsqueeze(1)], 1), mode="r").R[:n]
            self._triangle = triangle
        # The damping as n more residuals, √(W + λ) x (Moré 1978).
        damped = torch.cat([shift.sqrt().diag(), torch.zeros_like(shift).unsqueeze(1)], 1)
        R = torch.linalg.qr(torch.cat([triangle, damped]), mode="r").R
        R, c = R[:n, :n], R[:n, n:]
        self._factor = R
        if rest is not None:
            # A part of the gradient that is not Aᵀs, such as weight decay's: Rᵀc = rest.
            c = c + torch.linalg.solve_triangular(R.mT, rest.unsqueeze(1), upper=False)
        return -torch.linalg.solve_triangular(R, c, upper=True).squeeze(1)

    def pull_back(self, u: Tensor) -> Tensor:
        """``(F + W + λ)⁻¹ Aᵀ u`` for what was last solved."""
        if self._is_refined and self._refined is not None:
            x = self._refined.solve(-u, None)
            if x is not None:
                return x
            self._solve_by_qr(self._shift, None)  # for its factor
            self._is_refined = False
        right = (self.square_root.rows.T @ u).unsqueeze(1)
        half = torch.linalg.solve_triangular(self._factor.mT, right, upper=False)
        return torch.linalg.solve_triangular(self._factor, half, upper=True).squeeze(1)


class SampleSpace(RootSolver):
    """The system in the space of the model's outputs, of which there are fewer than parameters.

    ``x = −D⁻¹(rest + Aᵀ y)`` with ``(I + A D⁻¹ Aᵀ) y = s − A D⁻¹ rest`` and ``D = W + diag(λ)``
    (Woodbury; Chen & Heyl 2024, Rende et al. 2024).
    """

    name = "sample"

    def __init__(self, root: SqrtGGN) -> None:
        super().__init__(root)
        self._unit: Tensor | None = None
        self._factor = self._gram = root.rows

    def solve(self, model: QuadraticModel) -> LinearSolution:
        """By the Cholesky factor of a matrix with a row for each output."""
        A, s, _ = self.square_root
        # D = size · unit: where only its size changes, as with λI, the Gram matrix is kept.
        size = model.shift.mean()
        unit = model.shift / size
        if self._unit is None or not torch.allclose(unit, self._unit, rtol=1e-12, atol=0):
            self._unit, self._gram = unit, gram(A * unit.rsqrt())
        rest = _find_remainder(self.square_root, model)
        pulled = None if rest is None else rest / model.shift
        # (A D⁻¹Aᵀ + I) times `size`.
        L, info = torch.linalg.cholesky_ex(
            self._gram + size * torch.eye(len(s), dtype=s.dtype, device=s.device)
        )
        if info:  # the host waits: another damping is tried then
            return _indefinite_solution(model)
        self._factor = L
        x = self.pull_back(s if pulled is None else s - A @ pulled)
        return _solution_from_rows(-(x if pulled is None else x + pulled), A, model)

    def pull_back(self, u: Tensor) -> Tensor:
        """``(F + W + λ)⁻¹ Aᵀ u`` for what was last solved."""
        assert self._unit is not None
        return (
            self.square_root.rows.T
            @ torch.cholesky_solve(u.unsqueeze(1), self._factor).squeeze(1)
            / self._unit
        )


class Matrix(Solver):
    """The n×n matrix from products, for any curvature with few parameters."""

    name = "dense"

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor) -> None:
        n = len(like)
        columns = torch.zeros(n, n, dtype=like.dtype, device=like.device)
        unit = torch.zeros_like(like)
        for i in range(n):
            began = perf_counter()
            unit[i] = 1
            columns[i] = product(unit)
            unit[i] = 0
            if i == _TIMED:
                tell_if_long("dense", n**3 // 3, like, n * (perf_counter() - began))
        self._matrix = (columns + columns.T) / 2
        self.diagonal = self._matrix.diagonal()

    def solve(self, model: QuadraticModel) -> LinearSolution:
        """By its Cholesky factor; where it has none, more damping must come to the rescue."""
        L, info = torch.linalg.cholesky_ex(self._matrix + model.shift.diag())
        if info:  # the host waits: another damping is tried then
            return _indefinite_solution(model)
        x = torch.cholesky_solve(model.right_side.unsqueeze(1), L).squeeze(1)
        image = self._matrix @ x + model.shift * x
        return _solution_of(x, model, image, torch.dot(x, image))


def _find_remainder(root: SqrtGGN, model: QuadraticModel) -> Tensor | None:
    """``−b − Aᵀs``: the part of the right-hand side that is not the residuals'; None where it is rounding."""
    rest = -model.right_side - root.rows.T @ root.slope
    # Aᵀs sums len(s) terms, whose rounding errors are independent.
    noise = (
        torch.finfo(rest.dtype).eps
        * math.sqrt(len(root.slope))
        * root.rows.norm()
        * root.slope.norm()
    )
    # The host waits once a point: without a rest each solution takes half as long.
    return rest if rest.norm() > 10 * noise else None


def _solution_from_rows(x: Tensor, A: Tensor, model: QuadraticModel) -> LinearSolution:
    pushed = A @ x
    image = A.T @ pushed + model.shift * x
    return _solution_of(x, model, image, pushed.square().sum() + torch.dot(model.shift, x * x))


def _solution_of(
    x: Tensor, model: QuadraticModel, image: Tensor, quadratic: Tensor
) -> LinearSolution:
    b = model.right_side
    # The host waits once a solution, for what the trust region needs.
    x_dot_ax, x_dot_b, residual, norm = read(
        quadratic, torch.dot(x, b), (b - image).norm(), b.norm()
    )
    finite = math.isfinite(x_dot_ax) and math.isfinite(x_dot_b)
    return LinearSolution(
        solution=x if finite else torch.zeros_like(x),
        iterations=0,
        products=0,
        residual=residual / norm if norm else 0.0,
        stop="exact" if finite else "not_finite",
        x_dot_b=x_dot_b if finite else 0.0,
        x_dot_r=x_dot_b - x_dot_ax if finite else 0.0,
    )


def _indefinite_solution(model: QuadraticModel) -> LinearSolution:
    return LinearSolution(torch.zeros_like(model.gradient), 0, 0, 1.0, "indefinite", 0.0, 0.0)
