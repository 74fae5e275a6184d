"""Traces and diagonals of a symmetric matrix from few products: XTrace and XDiag.

Each random vector in turn is left out of the basis that the images of the others span; the rest of the
matrix is estimated with the one left out (Epperly, Tropp & Webber 2024, XTrace: making the most of every
sample in stochastic trace estimation).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]
"""``V ↦ A V`` for columns, (n, k)."""


class Estimate(NamedTuple):
    """An estimate, and how far it is off.

    Attributes:
        value: of what is estimated.
        error: its standard error, as it shows in the estimates that are averaged; 0 where the value
            is exact.

    Examples:
        >>> import torch
        >>> from ngd_optim import linearize
        >>> x = torch.nn.Parameter(torch.ones(100, dtype=torch.float64))
        >>> point = linearize(lambda: (x**3).sum(), [x])
        >>> trace, error = point.curvature.trace(products=20)
        >>> bool(abs(trace - 600) <= 3 * error + 1e-6)
        True
    """

    value: Tensor
    error: Tensor


class _LeftOut(NamedTuple):
    """Random vectors ω, and bases Q₍ᵢ₎ of the images of all but the i-th.

    With ``Y = A Ω = Q R``, ``Q₍ᵢ₎ Q₍ᵢ₎ᵀ = Q Qᵀ − qᵢ qᵢᵀ`` for ``qᵢ = Q sᵢ``, where ``sᵢ`` are the
    normalised columns of ``R⁻ᵀ``.

    Attributes:
        omega: ``Ω``, (n, m).
        images: ``A Ω``.
        basis: ``Q``.
        of_basis: ``A Q``.
        q: ``Q S``.
        of_q: ``A Q S``.
    """

    omega: Tensor
    images: Tensor
    basis: Tensor
    of_basis: Tensor
    q: Tensor
    of_q: Tensor


def _leave_out(multiply: Multiply, omega: Tensor) -> _LeftOut:
    images = multiply(omega)
    Q, R = torch.linalg.qr(images)
    # Of a matrix of lower rank R is singular, and any basis of the rest will do.
    diagonal = R.diagonal()
    largest = diagonal.abs().amax()
    floor = torch.where(largest > 0, torch.finfo(R.dtype).eps * largest, 1.0)
    R = R + torch.where(diagonal.abs() < floor, floor, 0.0).diag()
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    S = torch.linalg.solve_triangular(R.mT, identity, upper=False)
    S = S / torch.linalg.vector_norm(S, dim=0)
    of_basis = multiply(Q)
    return _LeftOut(omega, images, Q, of_basis, Q @ S, of_basis @ S)


def estimate_trace(
    multiply: Multiply, like: Tensor, products: int, generator: torch.Generator
) -> Estimate:
    """The trace, by XTrace with normalised vectors (section 2.3 of the paper).

    Args:
        multiply: by the matrix.
        like: a flat vector of the matrix's size.
        products: how many; half of them span the basis.
        generator: draws.
    """
    n, m = len(like), products // 2
    omega = _draw_normal(n, m, like, generator)
    omega, images, Q, of_basis, q, of_q = _leave_out(multiply, omega)
    # rᵢ = (I − Q₍ᵢ₎ Q₍ᵢ₎ᵀ) ωᵢ, and A rᵢ of what is known.
    W, d = Q.mT @ omega, (q * omega).sum(0)
    r = omega - Q @ W + q * d
    of_r = images - of_basis @ W + of_q * d
    # Within the complement, ωᵢ is scaled to a length that is known: less variance, no bias.
    scale = (n - m + 1) / r.square().sum(0).clamp(min=torch.finfo(r.dtype).tiny)
    inside = (Q * of_basis).sum() - (q * of_q).sum(0)
    return _average(inside + scale * (r * of_r).sum(0))


def estimate_diagonal(
    multiply: Multiply, like: Tensor, products: int, generator: torch.Generator
) -> Estimate:
    """The diagonal, by XDiag with random signs (section 2.4); see :func:`estimate_trace` for the arguments."""
    omega = _draw_normal(len(like), products // 2, like, generator).sign()
    omega, images, Q, of_basis, q, of_q = _leave_out(multiply, omega)
    # diag(Q₍ᵢ₎ Q₍ᵢ₎ᵀ A) + ωᵢ ⊙ (I − Q₍ᵢ₎ Q₍ᵢ₎ᵀ) A ωᵢ, where A ωᵢ has only qᵢ outside of Q₍ᵢ₎.
    inside = (Q * of_basis).sum(1, keepdim=True) - q * of_q
    return _average(inside + omega * q * (q * images).sum(0))


def _draw_normal(n: int, m: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(n, m, generator=generator, device=generator.device).to(like)


def _average(estimates: Tensor) -> Estimate:
    """Over the last dimension."""
    error = estimates.std(-1) / estimates.shape[-1] ** 0.5
    return Estimate(estimates.mean(-1), error)
