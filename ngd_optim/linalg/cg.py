"""Conjugate gradients for ``A x = b``, with a symmetric positive definite ``A`` that is only multiplied."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from ngd_optim.linalg.scalars import Scalar, choose_scalars
from ngd_optim.reading import read

Stop = Literal[
    "max_iters", "tolerance", "progress", "negative_curvature", "not_finite", "exact", "indefinite"
]
# While a solve runs, its reason to stop is a number: 0 until there is one, so that a solve without
# one was cut off.
_STOPS: tuple[Stop, ...] = (
    "max_iters",
    "tolerance",
    "progress",
    "negative_curvature",
    "not_finite",
    "not_finite",
    "not_finite",
)
_TOLERANCE, _PROGRESS, _NEGATIVE_CURVATURE, _B, _PRECONDITIONER, _PRODUCT = range(1, 7)
_INDEFINITE_PRECONDITIONER = -1

NotFinite = Literal["", "b", "preconditioner", "product"]
_NOT_FINITE: dict[int, NotFinite] = {
    _B: "b",
    _PRECONDITIONER: "preconditioner",
    _PRODUCT: "product",
}

_START = 5
"""What comes before the first iteration of an optimizer's solve costs about as much as this many iterations."""


@dataclass(frozen=True)
class LinearSolution:
    """What :func:`conjugate_gradient` found, and why it stopped.

    Attributes:
        solution: the approximate solution ``x``, same shape as ``b``.
        iterations: CG iterations done.
        products: calls of ``matvec``: ``iterations``, one more if ``x0`` was not zero, and on an
            accelerator up to seven more until it was seen that the solve had stopped.
        residual: ``‖b − A x‖ / ‖b‖`` as the recursion tracks it; 0 if ``b`` is zero.
        stop: ``"tolerance"`` (residual small enough), ``"progress"`` (the quadratic model hardly
            falls any more), ``"max_iters"``, ``"negative_curvature"`` (a direction with
            ``pᵀA p ≤ 0``; see ``boundary``) or ``"not_finite"`` (``b`` or a product had a NaN or an
            infinity; ``solution`` is the last iterate before it). ``"exact"`` and ``"indefinite"``
            are for the direct solvers of NaturalCG.
        x_dot_b: ``xᵀb``.
        x_dot_r: ``xᵀ(b − A x)``. With ``x_dot_b`` it gives ``xᵀA x`` without another product.
        not_finite: what was not, where that is why it stopped: ``"b"``, ``"preconditioner"`` or
            ``"product"``; else empty.

    Examples:
        >>> import torch
        >>> from ngd_optim import conjugate_gradient
        >>> result = conjugate_gradient(lambda v: 2 * v, torch.ones(3))
        >>> result.stop, result.iterations, result.x_dot_ax
        ('tolerance', 1, 1.5)
    """

    solution: Tensor
    iterations: int
    products: int
    residual: float
    stop: Stop
    x_dot_b: float
    x_dot_r: float
    not_finite: NotFinite = ""

    @property
    def x_dot_ax(self) -> float:
        """``xᵀA x``."""
        return self.x_dot_b - self.x_dot_r


CGResult = LinearSolution
"""Its name in 0.1.0."""


class IndefinitePreconditionerError(ValueError):
    """A preconditioner is not positive definite.

    Attributes:
        products: calls of ``matvec`` until that was seen.
    """

    def __init__(self, value: float, products: int) -> None:
        super().__init__(
            f"the preconditioner must be positive definite, and a vector r has rᵀM⁻¹r = {value:.3g}; "
            "use one that is, or None"
        )
        self.products = products


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    x0: Tensor | None = None,
    max_iters: int = 250,
    tol: float = 1e-6,
    progress_tol: float = 0.0,
    boundary: float | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> LinearSolution:
    """Solve ``A x = b`` by conjugate gradients (Hestenes & Stiefel 1952; Nocedal & Wright, Algorithms 5.2 and 5.3).

    On an accelerator the host waits for the device at every eighth iteration only, to see whether
    to stop; products that were formed after the stop change nothing.

    Args:
        matvec: ``v ↦ A v`` for a vector shaped like ``b``.
        b: right-hand side, shape ``(n,)``.
        x0: where to start, as far along as the quadratic model ``φ(x) = ½ xᵀA x − bᵀx`` falls: at
            the lowest point between zero and ``x0``. So the solution always has ``bᵀx > 0`` (a
            descent direction when ``b = −g``), however early it is cut off.
        max_iters: most iterations.
        tol: stop when ``‖b − A x‖ ≤ tol · ‖b‖``.
        progress_tol: stop when ``φ`` gained less per iteration, over the last ``max(3, i/10)`` of
            them, than this fraction of what it has gained per iteration so far, with the start
            counted as five; 0 turns the test off. It is Martens' test (2010, section 4.4) with a
            threshold that suits short solves and long ones: what is spent on more iterations here
            could be spent on another step.
        boundary: where a direction ``p`` of negative curvature ends the solve, go along it as far
            as ``xᵀA x + τ² |pᵀA p| ≤ boundary`` allows (after Steihaug 1983, in the norm of
            ``|A|``). Infinity: as far as a positive curvature of that size would make it
            (saddle-free Newton: Dauphin et al. 2014). None, or if ``x`` is outside already, or the
            curvature is zero to rounding: stay, or take all of ``p`` if it is the first (Nocedal &
            Wright, Algorithm 7.1).
        preconditioner: ``r ↦ M⁻¹ r`` for a symmetric positive definite ``M`` that is like ``A``. It
            changes how fast the solution is found, and never the solution.

    Raises:
        ValueError: ``b`` is not a vector, ``x0`` has another shape, a setting is negative, or the
            preconditioner is not positive definite.

    Examples:
        >>> import torch
        >>> from ngd_optim import conjugate_gradient
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradient(lambda v: A @ v, torch.tensor([1.0, 2.0])).solution
        tensor([0.0909, 0.6364])
    """
    _check(b, x0, max_iters, tol, progress_tol)
    on = choose_scalars(b.device)
    x = r = None
    model, start_products = 0.0, 0
    if x0 is None or on.is_seen_to_vanish(x0):
        (norm,) = read(_norm(b))  # the host waits before the first iteration: b may be zero
    else:
        a_x0 = matvec(x0)
        start_products = 1
        # The host waits before the first iteration: the start may be no better than zero.
        norm, slope, x0_dot_ax0 = read(_norm(b), torch.dot(b, x0), torch.dot(x0, a_x0))
        if slope > 0 and math.isfinite(norm) and math.isfinite(x0_dot_ax0):
            # The lowest point of φ between zero and x0.
            fraction = min(1.0, slope / x0_dot_ax0) if x0_dot_ax0 > 0 else 1.0
            x, r = fraction * x0, torch.sub(b, a_x0, alpha=fraction)
            model = fraction * (0.5 * fraction * x0_dot_ax0 - slope)
        del a_x0
    target = tol * norm
    # From here on: r = b − A x, and φ(x) = ½ xᵀA x − bᵀx is the last of `models`.
    x0 = None  # of long vectors there is none to spare
    if x is None or r is None:
        x, r = torch.zeros_like(b), b.clone()

    def first(stop: Scalar, condition: Scalar, reason: int) -> Scalar:
        return on.choose((stop == 0) & condition, reason, stop)

    p = a_p = torch.zeros_like(b)
    models, iterations, stop, previous = [model], 0, 0, math.inf
    while True:
        r_dot_r = on.dot(r, r)
        stop = first(stop, _not_finite(r_dot_r), _PRODUCT if len(models) > 1 else _B)
        stop = first(stop, r_dot_r**0.5 <= target, _TOLERANCE)
        stop = first(stop, _has_stalled(models, progress_tol), _PROGRESS)
        rounds = len(models) - 1
        if rounds == max_iters or rounds % on.look_every == 0:
            reason, done = on.read(stop, iterations)
            if rounds == max_iters or reason:
                break

        # z = M⁻¹ r (Nocedal & Wright, Algorithm 5.3).
        z = r if preconditioner is None else preconditioner(r)
        r_dot_z = r_dot_r if z is r else on.dot(r, z)
        stop = first(stop, _not_finite(r_dot_z), _PRECONDITIONER)
        stop = first(stop, r_dot_z <= 0, _INDEFINITE_PRECONDITIONER)
        # Where the solve has stopped, beta is 1 and the other factors are 0: nothing moves any
        # more.
        going = stop == 0
        iterations = iterations + going
        # β = rᵀz ÷ its last value, and p ← z + β p: conjugate to all directions before.
        beta = on.choose(going, r_dot_z, 1.0) / on.choose(going, previous, 1.0)
        on.add(p.mul_(beta), z, 1.0 * going)
        del a_p
        a_p = matvec(p)
        p_dot_ap = on.dot(p, a_p)
        stop = first(stop, _not_finite(p_dot_ap), _PRODUCT)
        stop = first(stop, p_dot_ap <= 0, _NEGATIVE_CURVATURE)

        going = stop == 0
        # α = rᵀz ÷ pᵀA p is the minimum of φ along p.
        alpha = on.choose(going, r_dot_z, 0.0) / on.choose(going, p_dot_ap, 1.0)
        on.add(x, p, alpha)
        on.add(r, a_p, -alpha)
        # An exact step along p lowers φ by ½ α rᵀz: the model's value costs nothing.
        models.append(models[-1] - 0.5 * alpha * r_dot_z)
        previous = r_dot_z

    if reason == _INDEFINITE_PRECONDITIONER:
        raise IndefinitePreconditionerError(float(previous), rounds + start_products)
    # Along p the model falls without end: to the boundary (Steihaug 1983), or all of p if it is the
    # first.
    if reason == _NEGATIVE_CURVATURE:
        length = _length_to_boundary(x, b, r, p, a_p, boundary)
        if not length and done == 1:
            length = 1.0
        x.add_(p, alpha=length)
        r.sub_(a_p, alpha=length)
    # And after the last, for the step's length; between, every `look_every`-th iteration.
    residual, x_dot_b, x_dot_r = read(_norm(r), torch.dot(x, b), torch.dot(x, r))
    return LinearSolution(
        solution=x,
        iterations=done,
        products=rounds + start_products,
        residual=residual / norm if norm else 0.0,
        stop=_STOPS[reason],
        x_dot_b=x_dot_b,
        x_dot_r=x_dot_r,
        not_finite=_NOT_FINITE.get(reason, ""),
    )


def _norm(v: Tensor) -> Tensor:
    return cast(Tensor, v.norm())  # pyright: ignore[reportUnknownMemberType]  (torch declares only some of its types)


def _not_finite(value: Scalar) -> Scalar:
    return value - value != 0  # for numbers and tensors alike


def _length_to_boundary(
    x: Tensor, b: Tensor, r: Tensor, p: Tensor, a_p: Tensor, boundary: float | None
) -> float:
    # The host waits, where CG has met negative curvature: it ends there.
    if boundary == math.inf:
        curvature = abs(torch.dot(p, a_p).item())
        # τ = pᵀr ÷ |pᵀA p| (Dauphin et al. 2014).
        return torch.dot(p, r).item() / curvature if curvature > _rounding(p, a_p) else 0.0
    # What is left of xᵀA x + τ² |pᵀA p| ≤ boundary, with A x = b − r.
    room = 0.0 if boundary is None else boundary - torch.dot(x, b - r).item()
    if room <= 0:
        return 0.0
    # A curvature of zero is known to rounding only; the step along it stays finite.
    return math.sqrt(room / max(abs(torch.dot(p, a_p).item()), _rounding(p, a_p)))


def _rounding(p: Tensor, a_p: Tensor) -> float:
    return torch.finfo(p.dtype).eps * (_norm(p) * (_norm(p) + _norm(a_p))).item()


def _has_stalled(models: list[Scalar], progress_tol: float) -> Scalar:
    i = len(models) - 1
    window = max(3, i // 10)
    if progress_tol == 0 or i < window:
        return False
    average = models[-1] / (_START + i)
    return (
        models[-1] - models[-1 - window] > window * progress_tol * average
    )  # φ and its differences are negative


def _check(b: Tensor, x0: Tensor | None, max_iters: int, tol: float, progress_tol: float) -> None:
    if b.ndim != 1:
        raise ValueError(f"b must be a vector, got shape {tuple(b.shape)}")
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 must have the shape of b, {tuple(b.shape)}, got {tuple(x0.shape)}")
    if not max_iters >= 0:
        raise ValueError(f"max_iters must be at least 0, got {max_iters}")
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if not progress_tol >= 0:
        raise ValueError(f"progress_tol must be at least 0, got {progress_tol}")
