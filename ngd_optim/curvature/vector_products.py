"""Curvature products, by forward mode (torch.func), by double-backward (autograd), and by differences.

Both forms take and return one tensor per parameter. ``Jᵀ H J v`` needs three parts: pushing a
tangent of the parameters to the outputs, weighting it, and pulling it back; the pull-back is
autograd's for all of them.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ngd_optim.torch_internals import RealZeros, is_watched, load_forward_mode

Tensors = Sequence[Tensor]
Map = Callable[[Tensors], Tensors]


def push_forward(
    function: Callable[..., tuple[Tensor, ...]], params: Tensors, *, real_zeros: bool = False
) -> Map:
    """``v ↦ J v`` for ``J = ∂ function / ∂ params``, by forward mode.

    Args:
        function: of as many tensors.
        params: where.
        real_zeros: for functions that write to tangents, which may be zeros without memory.
    """
    load_forward_mode()
    primals = tuple(p.detach() for p in params)

    def push(v: Tensors) -> Tensors:
        with RealZeros() if real_zeros or is_watched() else nullcontext():
            return [t.detach() for t in torch.func.jvp(function, primals, tuple(v))[1]]

    return push


def push_by_double_backward(outputs: Tensors, params: Tensors) -> Map:
    """``v ↦ J v`` for ``J = ∂ outputs / ∂ params``, as the derivative of ``u ↦ Jᵀ u``, which is linear."""
    # g(u) = Jᵀu is linear, whatever u is; its derivative along v, transposed, is J v.
    u = [torch.zeros_like(z, requires_grad=True) for z in outputs]
    with torch.enable_grad():
        pulled = torch.autograd.grad(outputs, params, u, create_graph=True, materialize_grads=True)
    # A parameter that the outputs do not depend on has a gradient without a graph.
    linear = [i for i, g in enumerate(pulled) if g.requires_grad]

    def push(v: Tensors) -> Tensors:
        return torch.autograd.grad(
            [pulled[i] for i in linear],
            u,
            [v[i] for i in linear],
            retain_graph=True,
            materialize_grads=True,
        )

    return push


def pull_back(outputs: Tensors, params: Tensors) -> Map:
    """``u ↦ Jᵀ u`` for ``J = ∂ outputs / ∂ params``."""

    def pull(u: Tensors) -> Tensors:
        return torch.autograd.grad(outputs, params, u, retain_graph=True, materialize_grads=True)

    return pull


def hessian(scalar: Tensor, variables: Tensors) -> Map:
    """``v ↦ (∂² scalar / ∂ variables²) v``, by differentiating the gradient once more (Pearlmutter 1994)."""
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            scalar, variables, create_graph=True, materialize_grads=True
        )
    # Where the gradient is constant, the Hessian's rows are zero.
    curved = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]

    def product(v: Tensors) -> Tensors:
        if not curved:
            return [torch.zeros_like(variable) for variable in variables]
        return torch.autograd.grad(
            [gradients[i] for i in curved],
            variables,
            [v[i] for i in curved],
            retain_graph=True,
            materialize_grads=True,
        )

    return product


def hessian_by_forward_mode(function: Callable[..., Tensor], params: Tensors) -> Map:
    """``v ↦ (∂² function / ∂ params²) v``, by pushing ``v`` through the gradient."""
    gradient = torch.func.grad(function, argnums=tuple(range(len(params))))
    return push_forward(gradient, params, real_zeros=True)


def difference_along(
    function: Callable[[Tensor], Tensors], v: Tensor, scale: float
) -> list[Tensor]:
    """The derivative of ``d ↦ function(d)`` at zero along ``v``, by a central difference.

    Args:
        function: of a flat displacement of the parameters.
        v: the direction, flat.
        scale: the norm of the parameters, in whose measure the displacement is small.
    """
    norm = torch.dot(v, v).item() ** 0.5
    if not norm:
        return [torch.zeros_like(t) for t in function(v)]
    # (f(hv) − f(−hv)) / 2h errs by h² f‴/6 and by ε |f| / h: h = ε^⅓ balances them.
    h = torch.finfo(v.dtype).eps ** (1 / 3) * max(scale, 1e-3) / norm
    pairs = zip(function(h * v), function(-h * v), strict=True)
    return [(ahead - behind) / (2 * h) for ahead, behind in pairs]
