"""Conjugate gradients for one matrix and several right-hand sides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ngd_optim.linalg.cg import LinearSolution, conjugate_gradient


@dataclass(frozen=True)
class LinearSolutions:
    """``A⁻¹ bᵢ`` of several right-hand sides, with the scalars ``bᵢᵀ A⁻¹ bⱼ`` that quadratic problems need of them.

    However early the solves were cut off, ``scalars[i, j]`` is all of ``bᵢᵀxⱼ``, ``xᵢᵀbⱼ`` and
    ``xᵢᵀA xⱼ``: what is computed from the scalars holds exactly for steps in the span of the
    solutions. For that, each solution is the best one in the span of all that were found (Galerkin's
    projection).

    Attributes:
        solutions: ``xᵢ``, shape ``(k, n)``.
        scalars: shape ``(k, k)``, float64, on the CPU; NaN if something was not finite.
        solves: what :func:`~ngd_optim.conjugate_gradient` says of each right-hand side, before the
            projection.
        products: products with ``A``, in all.

    Examples:
        >>> import torch
        >>> from ngd_optim import linearize
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> point = linearize(lambda: (x**3).sum(), [x])  # its Hessian is diag(6 x)
        >>> found = point.solve(torch.tensor([[6.0, 0.0], [6.0, 12.0]]))
        >>> found.solutions.round(decimals=3)
        tensor([[1., 0.],
                [1., 1.]])
        >>> found.scalars.round(decimals=3)
        tensor([[ 6.,  6.],
                [ 6., 18.]], dtype=torch.float64)
    """

    solutions: Tensor
    scalars: Tensor
    solves: tuple[LinearSolution, ...]
    products: int

    @property
    def is_finite(self) -> bool:
        """Whether all solutions are to be had."""
        return bool(self.scalars.isfinite().all())

    @classmethod
    def find(
        cls, matvec: Callable[[Tensor], Tensor], right_sides: Tensor, **settings: Any
    ) -> "LinearSolutions":
        """Solve by conjugate gradients; the settings are those of :func:`~ngd_optim.conjugate_gradient`.

        Args:
            matvec: ``v ↦ A v``, for a symmetric positive definite ``A``.
            right_sides: ``bᵢ``, shape ``(k, n)``.
            **settings: for each solve.
        """
        solves = tuple(conjugate_gradient(matvec, b, **settings) for b in right_sides)
        X = torch.stack([solve.solution for solve in solves])
        AX = torch.stack([matvec(x) for x in X])
        products = sum(solve.products for solve in solves) + len(X)
        # On the host: these are k × k.
        M, C = (_to_host(X @ other.T) for other in (AX, right_sides))
        if not (M.isfinite().all() and C.isfinite().all()) or any(s.not_finite for s in solves):
            return cls(X, torch.full_like(M, torch.nan), solves, products)
        # The best xᵢ' = Σⱼ Wⱼᵢ xⱼ has Xᵀ(bᵢ − A xᵢ') = 0: M W = C with M = X A Xᵀ.
        W = _pseudo_inverse((M + M.T) / 2, torch.finfo(X.dtype).eps) @ C
        solutions = W.T.to(X.dtype).to(X.device) @ X
        return cls(solutions, C.T @ W, solves, products)


def _to_host(matrix: Tensor) -> Tensor:
    return matrix.to("cpu").double()


def _pseudo_inverse(M: Tensor, eps: float) -> Tensor:
    """Of a positive semidefinite matrix of any scales: right-hand sides may be tiny, parallel or 0."""
    sizes = M.diagonal().abs().sqrt()
    scale = torch.where(sizes > 0, 1 / sizes, 0.0)
    scaled = scale[:, None] * M * scale
    pinv = cast(Callable[..., Tensor], torch.linalg.pinv)  # pyright: ignore[reportUnknownMemberType]
    return scale[:, None] * pinv(scaled, rtol=100 * eps, hermitian=True) * scale
