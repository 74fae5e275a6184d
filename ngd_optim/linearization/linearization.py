"""A closure at one point, for users: loss, gradient, curvature products."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from ngd_optim.distributed import ALONE, ShardedModules
from ngd_optim.kernels import twice_differentiable
from ngd_optim.linalg import LinearSolutions
from ngd_optim.linearization.point import Learnt, Point, linearize_mean
from ngd_optim.names import Backend, BackendChoice, Curvature, Kind
from ngd_optim.operators import CurvatureOperator
from ngd_optim.parameters import FlatParameters, name_parameters
from ngd_optim.shown import show
from ngd_optim.tracing import TracedClosure

_AT_ONCE = 64
"""Columns of the curvature."""


class Linearization:
    """A closure at one point, as :func:`linearize` finds it. Vectors are flat, in the order of the parameters.

    Attributes:
        loss: the loss, detached, 0-dim.
        gradient: its gradient, shape ``(n,)``; zero for parameters that the loss does not use.
        curvature: the undamped curvature ``F``: ``curvature(v)`` is its product with a vector,
            ``(n,) → (n,)``, or with several as columns. Valid only while the parameters are where they
            were, and their data, which may not be written to in place: linearize anew. See
            :class:`~ngd_optim.operators.CurvatureOperator`.
        kind: what the curvature is: ``"fisher"``, ``"ggn"`` or ``"hessian"``.
        backend: what forms the products: ``"double-backward"``, ``"torch.func"`` or
            ``"differences"``.

    Examples:
        >>> import torch
        >>> from ngd_optim import linearize
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> point = linearize(lambda: (x**3).sum(), [x])
        >>> point.loss, point.gradient
        (tensor(9.), tensor([ 3., 12.]))
    """

    def __init__(self, point: Point, runs: Sequence[TracedClosure]) -> None:
        self._point = point
        self._runs = runs
        self.loss = point.loss
        self.gradient = point.gradient
        self.kind: Kind = point.kind
        self.backend: Backend = point.product.backend
        self.curvature = CurvatureOperator(self._multiply_one, self._multiply, point.parameters)

    def diagonal(self) -> Tensor:
        """The diagonal of the curvature, shape ``(n,)``.

        It is exact: the sums of squares of a Jacobian's columns where that is small, else from
        ``n`` products.
        """
        with twice_differentiable(recomputes=self._point.graph.run.recomputes):
            diagonal = self._point.compute_cheap_diagonal()
        if diagonal is not None:
            return diagonal
        diagonal = torch.zeros_like(self.gradient)
        for part in torch.arange(len(diagonal), device=diagonal.device).split(_AT_ONCE):
            units = diagonal.new_zeros(len(diagonal), len(part))
            units[part, part - part[0]] = 1
            diagonal[part] = self.curvature(units)[part].diagonal()
        return diagonal

    def _multiply_one(self, v: Tensor) -> Tensor:
        with twice_differentiable():
            return self._point.product(v)

    def _multiply(self, columns: Tensor) -> Tensor:
        if not columns.shape[1]:
            return torch.zeros_like(columns)
        with twice_differentiable():
            return self._point.product.multiply(columns.T.contiguous()).T  # pyright: ignore[reportAttributeAccessIssue]

    def solve(
        self,
        right_sides: Tensor,
        *,
        damping: float = 0.0,
        max_iters: int = 250,
        tol: float = 1e-6,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
    ) -> LinearSolutions:
        """``(F + λI)⁻¹ b`` for several right-hand sides, and the scalars ``bᵢᵀ(F + λI)⁻¹ bⱼ``.

        It is what constrained steps need: of a gradient ``g`` and that of a constraint, ``b``, the
        solutions ``F⁻¹g`` and ``F⁻¹b`` with ``gᵀF⁻¹g``, ``gᵀF⁻¹b`` and ``bᵀF⁻¹b``.

        Args:
            right_sides: ``bᵢ``, shape ``(k, n)``, in the order of the parameters.
            damping: ``λ``.
            max_iters: most iterations of each solve.
            tol: each stops at this relative residual.
            preconditioner: as for :func:`~ngd_optim.conjugate_gradient`.

        Raises:
            TypeError: ``right_sides`` is no tensor, or complex.
            ValueError: ``right_sides`` has another shape, a setting is out of range, or the
                preconditioner is not positive definite.
        """
        n = len(self.gradient)
        if not isinstance(right_sides, Tensor) or right_sides.is_complex():
            is_tensor = isinstance(right_sides, Tensor)
            kind = right_sides.dtype if is_tensor else type(right_sides).__name__
            raise TypeError(
                f"right_sides must be a real tensor, got {kind}; use torch.as_tensor for arrays"
            )
        if right_sides.ndim != 2 or right_sides.shape[1] != n or not len(right_sides):
            raise ValueError(
                f"right_sides must have shape (k, {n}), one vector a row, got "
                f"{tuple(right_sides.shape)}; use torch.stack([b1, b2])"
            )
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping must be a finite number, at least 0, got {damping}")
        with twice_differentiable(), torch.no_grad():
            return LinearSolutions.find(
                lambda v: self._point.product(v).add_(v, alpha=damping),
                right_sides.detach().to(self.gradient),
                max_iters=max_iters,
                tol=tol,
                preconditioner=preconditioner,
            )

    @torch.no_grad()
    def measure(self) -> tuple[float, float | None]:
        """The loss, and the KL from the prediction here, at the parameters as they are now: a trial point.

        What was recorded of the closure is replayed, or it runs again. The loss is infinite where
        the closure is not defined. The KL is in nats per sample; None where the closure returned
        none.
        """
        with twice_differentiable():
            found = self._point.measure()
        for run in self._runs:
            run.settle()
        return found

    @classmethod
    def of(
        cls,
        closure: Any,
        parameters: FlatParameters,
        curvature: Curvature,
        backend: BackendChoice,
        learnt: Learnt,
    ) -> "Linearization":
        """Of a closure, or the mean of several, with what was learnt of closures before."""
        functions, weights = _with_weights(closure)
        runs = [TracedClosure(function, parameters) for function in functions]
        with twice_differentiable():
            point = linearize_mean(
                parameters, curvature, backend, learnt, ALONE, runs, weights=weights
            )
            point.product.record_for_several(point.gradient)  # pyright: ignore[reportAttributeAccessIssue]
            point.product.form(point.gradient)
        return cls(point, runs)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in _FORMER:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            find, instead = _FORMER[name]
            message = f"Linearization.{name} is deprecated since 0.2.0; use {instead}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return find(self)


_FORMER: dict[str, tuple[Callable[[Any], Any], str]] = {
    "product": (lambda self: self.curvature, "curvature"),
    "quick_diagonal": (lambda self: self.diagonal, "diagonal()"),
    "rounding": (
        lambda self: 10 * torch.finfo(self.loss.dtype).eps * abs(self.loss.item()),
        "10 * torch.finfo(loss.dtype).eps * abs(loss)",
    ),
    "has_kl": (lambda self: self._point.has_kl, "measure()[1] is not None"),
    "is_least_squares": (lambda self: self._point.is_least_squares, "what the closure calls"),
    "reached": (lambda self: self._point.reached, "ngd_optim.testing.check_closure(...).unused"),
    "used": (lambda self: self._point.used, "ngd_optim.testing.check_closure(...).unused"),
}
"""Attributes of version 0.1.0: how they are found, and what to use instead."""


def linearize(
    closure: Any,
    params: Iterable[Any],
    *,
    curvature: Curvature = "auto",
    backend: BackendChoice = "auto",
) -> Linearization:
    """Loss, gradient and curvature product of a closure at the current parameters.

    Args:
        closure: as for :meth:`NaturalCG.step <ngd_optim.NaturalCG.step>`: returns a loss,
            ``(loss, distribution)`` or ``(loss, kl)``. An iterable of closures stands for the mean of
            their losses and curvatures, and one of pairs ``(closure, size)`` for the mean in which
            each counts ``size`` times: the number of samples, where a loss is their mean. Each
            product runs all of them again, with the memory of one at a time.
        params: the parameters, or pairs of a name and one, in the order in which the flat vectors
            hold them; frozen ones are left out, and complex ones have two real numbers for each of
            theirs, as ``torch.view_as_real(p).flatten()`` has them.
        curvature: ``"fisher"`` for the returned metric's Hessian, ``"ggn"`` for the loss functions'
            Gauss-Newton matrix, ``"hessian"`` for that of the loss, ``"auto"`` for the first of the
            three that the closure offers.
        backend: what forms the products: ``"torch.func"`` (forward mode), ``"double-backward"``, or
            ``"auto"``: one that is right for the closure.

    Each call checks the derivatives against plain autograd, which takes some further gradients and
    products; an optimizer does that only at its first step with a closure.

    Raises:
        TypeError, ValueError: the closure returned something that is not a loss or a metric, or
            does not offer the curvature.
        NotImplementedError: torch knows no KL divergence for the distribution.
        RuntimeError: the closure holds something that cannot work, and the message says what to do
            instead.
        Exception: whatever the closure raises.

    Examples:
        >>> import torch
        >>> from ngd_optim import linearize
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> point = linearize(lambda: (x**3).sum(), [x])  # its Hessian is diag(6 x)
        >>> point.curvature(torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    for name, value, allowed in (
        ("curvature", curvature, Curvature),
        ("backend", backend, BackendChoice),
    ):
        if not isinstance(value, str) or value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {get_args(allowed)}, got {show(value)}")
    parameters, _ = name_parameters(params)
    if ShardedModules(parameters.params):
        raise ValueError(
            "linearize() works on parameters that are whole, and fully_shard has spread these over ranks; "
            "give it a model that is not sharded, or take a step of NaturalCG"
        )
    return Linearization.of(closure, parameters, curvature, backend, {})


def _with_weights(closure: Any) -> tuple[Sequence[Callable[[], Any]], Sequence[float] | None]:
    """The functions of an argument, and their weights in the mean; None: equal ones."""
    if callable(closure):
        return [closure], None
    found = list(closure) if isinstance(closure, Iterable) else []
    pairs = [one for one in found if isinstance(one, tuple) and len(one) == 2]
    functions = [function for function, _ in pairs] or found
    if not found or len(pairs) not in (0, len(found)) or not all(map(callable, functions)):
        raise TypeError(
            "linearize() needs a closure that computes the loss, an iterable of closures, or one of "
            f"pairs (closure, size), got {show(closure)}"
        )
    sizes = [size for _, size in pairs]
    if not all(isinstance(size, Real) and 0 < float(size) < math.inf for size in sizes):
        raise ValueError(f"sizes of closures must be finite numbers above 0, got {show(sizes)}")
    return functions, [size / sum(sizes) for size in sizes] or None
