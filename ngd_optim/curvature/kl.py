"""``torch.distributions`` objects as differentiable functions of their parameters."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Laplace,
    Normal,
    OneHotCategorical,
    Pareto,
    TransformedDistribution,
    Uniform,
)
from torch.distributions.kl import kl_divergence
from torch.distributions.transforms import Transform

# Where a distribution offers the same parameter in two forms, the unconstrained (or cheaper) one is
# taken.
_REDUNDANT = frozenset({"probs", "covariance_matrix", "precision_matrix"})
_USE_FORM_C = (
    "return (loss, kl) from the closure instead, with your own scalar KL estimate: closure form (c)"
)

Metric = Distribution | list["Metric"] | tuple["Metric", ...] | dict[str, "Metric"]


def distributions_in(metric: object) -> Iterator[Distribution]:
    """The distributions in nested lists, tuples and dicts, in order.

    Raises:
        TypeError: something in it is not a distribution.
    """
    if isinstance(metric, Distribution):
        yield metric
    elif isinstance(metric, list | tuple):
        for part in metric:
            yield from distributions_in(part)
    elif isinstance(metric, Mapping):
        for part in metric.values():
            yield from distributions_in(part)
    else:
        raise TypeError(
            "the metric that the closure returns must be a torch.distributions.Distribution, a "
            f"list, tuple or dict of them, or a scalar tensor, got {type(metric).__name__}"
        )


def parameters_of(distribution: Distribution) -> dict[str, Tensor]:
    """The tensors that define a distribution, by constructor argument.

    Raises:
        NotImplementedError: the distribution cannot be described by such tensors, or its support
            moves with them.
    """
    if isinstance(distribution, Uniform | Pareto):
        raise NotImplementedError(
            f"{type(distribution).__name__} has no Fisher information: its support depends on its "
            f"parameters; {_USE_FORM_C}"
        )
    base = _unwrap(distribution)
    if base is not None:
        return parameters_of(base)
    names = [name for name in distribution.arg_constraints if name not in _REDUNDANT]
    if distribution.arg_constraints.keys() == {"probs"}:
        names = ["probs"]
    values = {name: getattr(distribution, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def rebuild(distribution: Distribution, values: Mapping[str, Tensor]) -> Distribution:
    """The same distribution with other parameters, as :func:`parameters_of` names them.

    Raises:
        NotImplementedError: the constructor does not take them.
    """
    base = _unwrap(distribution)
    try:
        if isinstance(distribution, Independent):
            return Independent(
                rebuild(distribution.base_dist, values),
                distribution.reinterpreted_batch_ndims,
                validate_args=False,
            )
        if base is not None:
            assert isinstance(distribution, TransformedDistribution)
            return TransformedDistribution(
                rebuild(base, values), distribution.transforms, validate_args=False
            )
        constructor: Any = type(distribution)
        return constructor(**values, validate_args=False)
    except TypeError as error:
        raise NotImplementedError(
            f"{type(distribution).__name__} cannot be rebuilt from its parameters "
            f"{sorted(values)}; {_USE_FORM_C}"
        ) from error


def mean_kl(old: Distribution, new: Distribution) -> Tensor:
    """``KL(old ‖ new)`` averaged over the batch: a scalar, in nats per sample.

    Raises:
        NotImplementedError: torch knows no closed form.
    """
    try:
        return _kl(old, new).mean()
    except NotImplementedError as error:
        raise NotImplementedError(
            f"torch knows no closed-form KL divergence between two {type(old).__name__} "
            f"distributions; {_USE_FORM_C}"
        ) from error


def _kl(old: Distribution, new: Distribution) -> Tensor:
    """``KL(old ‖ new)``; torch's is infinite where a probability of ``new`` is below the smallest number."""
    if isinstance(old, Independent) and isinstance(new, Independent):
        inner = _kl(old.base_dist, new.base_dist)
        return inner.sum(list(range(inner.ndim - old.reinterpreted_batch_ndims, inner.ndim)))
    if isinstance(old, Categorical | OneHotCategorical) and isinstance(
        new, Categorical | OneHotCategorical
    ):
        # Σ p (log p − log q) from logits, which stay finite where probabilities underflow.
        return _expect(old.probs, old.logits - new.logits).sum(-1)
    if isinstance(old, Bernoulli) and isinstance(new, Bernoulli):
        yes = _expect(old.probs, F.softplus(-new.logits) - F.softplus(-old.logits))
        return yes + _expect(1 - old.probs, F.softplus(new.logits) - F.softplus(old.logits))
    return kl_divergence(old, new)


def _expect(probability: Tensor, value: Tensor) -> Tensor:
    return probability * torch.where(probability > 0, value, 0)


def local_divergence(old: Distribution, new: Distribution) -> Tensor:
    """A scalar whose Hessian in ``new``'s parameters, at ``new = old``, is that of :func:`mean_kl`."""
    base, new_base = _unwrap(old), _unwrap(new)
    if base is not None and new_base is not None:
        # The wrapper sums the base's KL over some dimensions, and its mean is over the others.
        # base.batch_shape has the dimensions that Independent sums over; a mean over them is too
        # small.
        return local_divergence(base, new_base) * (
            base.batch_shape.numel() / old.batch_shape.numel()
        )
    if isinstance(old, Laplace) and isinstance(new, Laplace):
        # Laplace's KL holds |loc − loc'|, whose second derivative autograd takes as 0 at the kink,
        # although the divergence itself is twice differentiable there. Its Fisher information is
        # 1/scale² in loc and in scale.
        distance = (
            (new.loc - old.loc).square() + (new.scale - old.scale).square()
        ) / old.scale.square()
        return 0.5 * distance.mean()
    if isinstance(old, Normal) and isinstance(new, Normal):
        # A quadratic, so that each product takes six pointwise operations in place of sixty.
        distance = (
            (new.loc - old.loc).square() + 2 * (new.scale - old.scale).square()
        ) / old.scale.square()
        return 0.5 * distance.mean()
    return mean_kl(old, new)


def _unwrap(distribution: Distribution) -> Distribution | None:
    """The base distribution, for a wrapper that has no parameters of its own."""
    if isinstance(distribution, Independent):
        return distribution.base_dist
    if isinstance(distribution, TransformedDistribution) and not distribution.arg_constraints:
        for transform in distribution.transforms:
            if _has_parameters(transform):
                raise NotImplementedError(
                    f"{type(transform).__name__} has learned parameters, and only the base "
                    f"distribution's can be followed; {_USE_FORM_C}"
                )
        return distribution.base_dist
    return None


def _has_parameters(part: object, seen: frozenset[int] = frozenset()) -> bool:
    """Whether a transform, or something inside it, holds what requires a gradient."""
    if isinstance(part, Tensor):
        return part.requires_grad
    if isinstance(part, nn.Module):
        return any(p.requires_grad for p in part.parameters())
    if isinstance(part, list | tuple):
        return any(_has_parameters(piece, seen) for piece in part)
    # A transform and its inverse know each other.
    if not isinstance(part, Transform) or id(part) in seen:
        return False
    return any(
        _has_parameters(value, seen | {id(part)})
        for name, value in vars(part).items()
        if name != "_cached_x_y"
    )
