"""What serves as a KL must be one: zero at the current parameters, with zero gradient, and never negative.

Anything else has another Hessian than the Fisher matrix there, and the trust region would bound
something else without a word. The checks cost some gradients, at the first step with a closure.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from ngd_optim.autograd_graph import dtypes
from ngd_optim.curvature.kl import USE_FORM_C, mean_kl, parameters_of
from ngd_optim.curvature.vector_products import Map, pull_back
from ngd_optim.parameters import FlatParameters

Product = Callable[[Tensor], Tensor]
Check = Callable[[FlatParameters, Product, Tensor], None]
"""Is given the parameters, the flat product ``v ↦ F v``, and a random vector. Raises what is to be said."""


def check_nothing(parameters: FlatParameters, product: Product, probe: Tensor) -> None:
    """For a metric that is no KL."""


def check_returned_kl(kl: Tensor) -> Check:
    """For a scalar that the closure returned, 0-dim, with its graph.

    The check raises ValueError.
    """

    def check(parameters: FlatParameters, product: Product, probe: Tensor) -> None:
        gradient = parameters.flatten(
            torch.autograd.grad(kl, parameters.tensors, retain_graph=True, allow_unused=True)
        )
        decrease = promised_decrease(gradient, product, probe)
        if decrease > _negligible(kl):
            raise ValueError(
                "the kl that the closure returns must have zero gradient at the current parameters, "
                f"but along its gradient it falls to {kl.item() - decrease:.2g}, and a KL is never "
                "negative; return kl_divergence(old, new).mean() from a detached copy of the "
                "current prediction, or from samples ((r - 1) - r.log()).mean() with r = new "
                "probability / old probability"
            )

    return check


def check_heads(
    heads: Sequence[Distribution],
    learned: Sequence[tuple[int, str]],
    outputs: Sequence[Tensor],
    rebuild: Callable[[], tuple[Sequence[Tensor], Sequence[Distribution]]],
    make_hessian: Callable[[], Map],
) -> Check:
    """For distributions: what was rebuilt of their parameters must be the same, and their KL a KL.

    The check raises NotImplementedError.

    Args:
        heads: what the closure returned.
        learned: for each output, its head and its name there.
        outputs: the parameters of ``heads`` with the graph that leads to them.
        rebuild: gives the same numbers without it, and the heads as functions of these.
        make_hessian: gives the KL's Hessian in them.
    """

    def check(parameters: FlatParameters, product: Product, probe: Tensor) -> None:
        (variables, rebuilt), apply_hessian = rebuild(), make_hessian()
        with torch.enable_grad():
            back = [parameters_of(rebuilt[i])[name] for i, name in learned]
            kl = torch.stack(
                [mean_kl(old, new) for old, new in zip(heads, rebuilt, strict=True)]
            ).sum()
        _require_same_parameters(heads, back, outputs, variables, parameters)
        gradients = torch.autograd.grad(kl, variables, retain_graph=True, materialize_grads=True)
        shapes = [z.shape for z in variables]

        def flat_hessian(v: Tensor) -> Tensor:
            pieces = v.split([shape.numel() for shape in shapes])
            return _flatten(
                apply_hessian(
                    [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
                )
            )

        g = _flatten(gradients)
        decrease = promised_decrease(g, flat_hessian, _random_like(g))
        if abs(kl.item()) > largest_kl_at_start(kl) or decrease > _negligible(kl):
            names = ", ".join(dict.fromkeys(type(head).__name__ for head in heads))
            raise NotImplementedError(
                f"the KL divergence that torch knows of {names} is not zero with zero gradient "
                f"between two that are the same; {USE_FORM_C}"
            )

    return check


def promised_decrease(gradient: Tensor, product: Product, probe: Tensor) -> float:
    """What a scalar falls by along its gradient, as its quadratic model has it; infinite where that has no minimum.

    Of a scalar that is zero and never negative, nothing.

    Args:
        gradient: flat.
        product: with its Hessian.
        probe: a random vector, whose image tells how large the Hessian is.
    """
    g = gradient.double()
    if not g.any():
        return 0.0
    # Along −g the minimum of gᵀd + ½ dᵀF d is −½ (gᵀg)² ÷ gᵀFg (Cauchy's point).
    along = (torch.dot(g, product(gradient).double()) / torch.dot(g, g)).item()
    on_average = (product(probe).double().norm() / probe.double().norm()).item()
    return (
        0.5 * torch.dot(g, g).item() / max(along, on_average)
        if max(along, on_average)
        else torch.inf
    )


def largest_kl_at_start(kl: Tensor) -> float:
    """What is not told from zero, in nats per sample: rounding, at least 1e-8, at most 1e-3."""
    return min(1e-3, max(1e-8, 100 * _coarsest_eps(kl)))


def _negligible(kl: Tensor) -> float:
    # Nothing that is never negative falls by more than it is; see also the rounding of its terms.
    return 2 * abs(kl.item()) + 10 * _coarsest_eps(kl)


def _coarsest_eps(kl: Tensor) -> float:
    return max(torch.finfo(t).eps for t in {kl.dtype, *dtypes([kl])} if t.is_floating_point)


def _require_same_parameters(
    heads: Sequence[Distribution],
    back: Sequence[Tensor],
    outputs: Sequence[Tensor],
    variables: Sequence[Tensor],
    parameters: FlatParameters,
) -> None:
    """A constructor may change what it is given, such as divide it by a temperature or take its softplus."""
    eps = max(torch.finfo(z.dtype).eps for z in variables)
    same = all(
        a.shape == b.shape and _agree(a, b, eps) for a, b in zip(back, variables, strict=True)
    )
    if same:
        # And so must their derivatives, for what the model can change: Jᵀ u = Jᵀ Gᵀ u, with G that of
        # the constructor.
        u = [_random_like(z) for z in variables]
        through = torch.autograd.grad(back, variables, u, retain_graph=True, materialize_grads=True)
        if not all(_agree(a, b, eps) for a, b in zip(through, u, strict=True)):
            pull = pull_back(outputs, parameters.tensors)
            same = _agree(parameters.flatten(pull(through)), parameters.flatten(pull(u)), eps)
    if not same:
        names = ", ".join(dict.fromkeys(type(head).__name__ for head in heads))
        raise NotImplementedError(
            f"the constructor of {names} changes the parameters that it is given, so that the "
            f"distribution cannot be rebuilt from them; {USE_FORM_C}"
        )


def _agree(a: Tensor, b: Tensor, eps: float) -> bool:
    """Whether two tensors are the same but for rounding; what is not finite is the step's matter."""
    return not bool((a - b).norm() > eps**0.5 * b.norm())


def _random_like(z: Tensor) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(z.shape, generator=generator, device="cpu").to(z)


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])
