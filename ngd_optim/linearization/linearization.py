"""A closure at one point, for users: loss, gradient, curvature products."""

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from ngd_optim.distributed import ShardedModules
from ngd_optim.kernels import twice_differentiable
from ngd_optim.linearization.point import Point, linearize_closure
from ngd_optim.names import Backend, BackendChoice, Curvature, Kind
from ngd_optim.parameters import FlatParameters
from ngd_optim.shown import show
from ngd_optim.tracing import TracedClosure


class Linearization:
    """A closure at one point, as :func:`linearize` finds it. Vectors are flat, in the order of the parameters.

    Attributes:
        loss: the loss, detached, 0-dim.
        gradient: its gradient, shape ``(n,)``; zero for parameters that the loss does not use.
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

    def __init__(self, point: Point) -> None:
        self._point = point
        self.loss = point.loss
        self.gradient = point.gradient
        self.kind: Kind = point.kind
        self.backend: Backend = point.product.backend

    def curvature(self, v: Tensor) -> Tensor:
        """The undamped curvature times a vector: ``(n,) → (n,)``.

        Valid only while the parameters are where they were: it reads them, and does not check.

        Raises:
            ValueError: ``v`` has another shape than the gradient.
        """
        if v.shape != self.gradient.shape:
            raise ValueError(
                f"v must have shape {tuple(self.gradient.shape)}, got {tuple(v.shape)}"
            )
        with twice_differentiable():
            return self._point.product(v.to(self.gradient))

    def diagonal(self) -> Tensor:
        """The diagonal of the curvature, shape ``(n,)``.

        It is exact: the sums of squares of a Jacobian's columns where that is small, else from
        ``n`` products.
        """
        with twice_differentiable(recomputes=self._point.graph.run.recomputes):
            diagonal = self._point.compute_cheap_diagonal()
        if diagonal is not None:
            return diagonal
        diagonal, unit = torch.zeros_like(self.gradient), torch.zeros_like(self.gradient)
        for i in range(len(unit)):
            unit[i] = 1
            diagonal[i] = self._point.product(unit)[i]
            unit[i] = 0
        return diagonal


def linearize(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    *,
    curvature: Curvature = "auto",
    backend: BackendChoice = "auto",
) -> Linearization:
    """Loss, gradient and curvature product of a closure at the current parameters.

    Args:
        closure: as for :meth:`NaturalCG.step <ngd_optim.NaturalCG.step>`: returns a loss,
            ``(loss, distribution)`` or ``(loss, kl)``.
        params: the parameters, in the order in which the flat vectors hold them; frozen ones are
            left out.
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
    tensors = list(params)
    if ShardedModules(tensors):
        raise ValueError(
            "linearize() works on parameters that are whole, and fully_shard has spread these over ranks; "
            "give it a model that is not sharded, or take a step of NaturalCG"
        )
    parameters = FlatParameters([{"params": tensors}])
    run = TracedClosure(closure, parameters)
    with twice_differentiable():
        point = linearize_closure(run, parameters, curvature, backend, {})
        point.product.form(point.gradient)
    return Linearization(point)
