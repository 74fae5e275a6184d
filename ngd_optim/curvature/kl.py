"""``torch.distributions`` objects as differentiable functions of their parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    ExponentialFamily,
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

from ngd_optim.torch_internals import kl_function_of

# Where a distribution offers the same parameter in two forms, the unconstrained (or cheaper) one is
# taken.
_REDUNDANT = frozenset({"probs", "covariance_matrix", "precision_matrix"})
USE_FORM_C = (
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
            f"list, tuple or dict of them, or a scalar tensor, got {type(metric).__name__}; of "
            "what else there is, return the loss alone"
        )


_FOUND: WeakKeyDictionary[Distribution, dict[str, Tensor]] = WeakKeyDictionary()
"""The parameters of distributions, as they were when first asked for: some are made anew each time."""


def parameters_of(distribution: Distribution) -> dict[str, Tensor]:
    """The tensors that define a distribution, by constructor argument.

    Raises:
        NotImplementedError: the distribution cannot be described by such tensors, its support moves
            with them, or torch knows no KL.
    """
    if isinstance(distribution, Uniform | Pareto):
        raise NotImplementedError(
            f"{type(distribution).__name__} has no Fisher information: its support depends on its "
            f"parameters; {USE_FORM_C}"
        )
    base = _unwrap(distribution)
    if base is not None:
        return parameters_of(base)
    if distribution in _FOUND:
        return _FOUND[distribution]
    arguments = _arguments_of(distribution)
    names = arguments if arguments == {"probs"} else arguments - _REDUNDANT
    values = {name: getattr(distribution, name) for name in sorted(names)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        raise NotImplementedError(
            f"{type(distribution).__name__} names no tensors as its parameters in arg_constraints; "
            f"{USE_FORM_C}"
        )
    return _FOUND.setdefault(distribution, tensors)


def _arguments_of(distribution: Distribution) -> set[str]:
    kind = _kind_of(distribution)
    named_by: Any = distribution if kind is type(distribution) else kind
    try:
        constraints = named_by.arg_constraints
    except NotImplementedError:  # a class of the user's that has none
        return set()
    # Of a class it may be a property.
    return set(constraints) if isinstance(constraints, Mapping) else set()


def tensors_of(metric: object) -> list[Tensor]:
    """The tensors that define what a closure returned beside the loss; none, where they cannot tell."""
    if metric is None or isinstance(metric, Tensor):
        return [] if metric is None else [metric]
    try:
        return [t for head in distributions_in(metric) for t in parameters_of(head).values()]
    except NotImplementedError:
        return []


def with_tensors(metric: object, tensors: Sequence[Tensor]) -> object:
    """The same with other tensors, in the order of :func:`tensors_of`; distributions come as a list."""
    if metric is None or isinstance(metric, Tensor):
        return tensors[0] if tensors else None
    rest = iter(tensors)
    names = [(head, parameters_of(head)) for head in distributions_in(metric)]
    return [rebuild(head, {name: next(rest) for name in values}) for head, values in names]


def rebuild(distribution: Distribution, values: Mapping[str, Tensor]) -> Distribution:
    """The same distribution with other parameters, as :func:`parameters_of` names them.

    Raises:
        NotImplementedError: the constructor does not take them.
    """
    kind: Any = _kind_of(distribution)
    base = _unwrap(distribution)
    if base is not None:
        inner = rebuild(base, values)
        if isinstance(distribution, Independent):
            return Independent(inner, distribution.reinterpreted_batch_ndims, validate_args=False)
        # What _unwrap knows but Independent.
        transforms: Any = distribution.transforms  # pyright: ignore[reportAttributeAccessIssue]
        return TransformedDistribution(inner, transforms, validate_args=False)
    try:
        return kind(**values, validate_args=False)
    except (TypeError, ValueError, AttributeError) as error:
        raise NotImplementedError(
            f"{type(distribution).__name__} cannot be rebuilt from its parameters "
            f"{sorted(values)}; {USE_FORM_C}"
        ) from error


def _kind_of(distribution: Distribution) -> type[Distribution]:
    """The class of torch that it has its KL from, the most general one; its own class if that has another KL.

    A subclass may take other arguments than it passes on, such as a temperature. What it is to
    ``kl_divergence`` can be built by torch's constructor all the same.

    Raises:
        NotImplementedError: torch knows no KL.
    """
    own = type(distribution)
    kl = kl_function_of(own)
    if kl is NotImplemented:
        raise NotImplementedError(_without_kl(distribution))
    of_torch = [
        kind
        for kind in own.__mro__
        if kind.__module__.startswith("torch.distributions.")
        and kind is not ExponentialFamily  # it has a KL and no constructor
        and kl_function_of(kind) is kl
    ]
    return of_torch[-1] if of_torch else own


def _without_kl(distribution: Distribution) -> str:
    name = type(distribution).__name__
    return (
        f"torch knows no closed-form KL divergence between two {name} distributions; {USE_FORM_C}"
    )


def mean_kl(old: Distribution, new: Distribution) -> Tensor:
    """``KL(old ‖ new)`` averaged over the batch: a scalar, in nats per sample.

    Raises:
        NotImplementedError: torch knows no closed form, or the transforms differ.
    """
    try:
        return _kl(old, new).mean()
    except NotImplementedError as error:
        # Torch's own may say nothing.
        raise NotImplementedError(
            str(error) if USE_FORM_C in str(error) else _without_kl(old)
        ) from error


def _kl(old: Any, new: Any) -> Tensor:
    """``KL(old ‖ new)``; torch's is infinite where a probability of ``new`` is below the smallest number."""
    kind = _kind_of(old)
    if kind is Independent:
        inner = _kl(old.base_dist, new.base_dist)
        return inner.sum(list(range(inner.ndim - old.reinterpreted_batch_ndims, inner.ndim)))
    if kind is TransformedDistribution:
        _require_same(old.transforms, new.transforms)
        return _kl(old.base_dist, new.base_dist)
    if kind in (Categorical, OneHotCategorical):
        # Σ p (log p − log q) from logits, which stay finite where probabilities underflow.
        return _expect(old.probs, old.logits - new.logits).sum(-1)
    if kind is Bernoulli:
        yes = _expect(old.probs, F.softplus(-new.logits) - F.softplus(-old.logits))
        return yes + _expect(1 - old.probs, F.softplus(new.logits) - F.softplus(old.logits))
    if type(old) is not type(new):  # torch's KL of an exponential family asks for that
        new = rebuild(new, parameters_of(new))
    return kl_divergence(old, new)


def _require_same(old: list[Transform], new: list[Transform]) -> None:
    """Raise NotImplementedError where transforms are known to differ: those that can be compared are."""
    for a, b in zip(old, new, strict=True):
        cannot_be_compared = type(a).__eq__ is Transform.__eq__  # but with themselves
        if not (a == b or (cannot_be_compared and type(a) is type(b))):
            raise NotImplementedError(_moving(a))


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
    if type(old) is Laplace and type(new) is Laplace:
        # Laplace's KL holds |loc − loc'|, whose second derivative autograd takes as 0 at the kink,
        # although the divergence itself is twice differentiable there. Its Fisher information is
        # 1/scale² in loc and in scale.
        distance = (
            (new.loc - old.loc).square() + (new.scale - old.scale).square()
        ) / old.scale.square()
        return 0.5 * distance.mean()
    if type(old) is Normal and type(new) is Normal:
        # A quadratic, so that each product takes six pointwise operations in place of sixty.
        distance = (
            (new.loc - old.loc).square() + 2 * (new.scale - old.scale).square()
        ) / old.scale.square()
        return 0.5 * distance.mean()
    return mean_kl(old, new)


def _unwrap(distribution: Distribution) -> Distribution | None:
    """The base distribution, for a wrapper whose KL is that of its base."""
    kind = _kind_of(distribution)
    if kind is Independent and isinstance(distribution, Independent):
        return distribution.base_dist
    if kind is TransformedDistribution and isinstance(distribution, TransformedDistribution):
        for transform in distribution.transforms:
            if any(t.requires_grad for t in _tensors_in(transform)):
                raise NotImplementedError(
                    f"{type(transform).__name__} has learned parameters, and only the base "
                    f"distribution's can be followed; {USE_FORM_C}"
                )
        return distribution.base_dist
    return None


def _tensors_in(part: object, seen: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """What a transform, or something inside it, holds."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, nn.Module):
        yield from part.parameters()
    elif isinstance(part, Mapping):
        yield from _tensors_in(list(part.values()), seen)
    elif isinstance(part, list | tuple):
        for piece in part:
            yield from _tensors_in(piece, seen)
    # A transform and its inverse know each other.
    elif isinstance(part, Transform) and id(part) not in seen:
        for name, value in vars(part).items():
            if name != "_cached_x_y":
                yield from _tensors_in(value, seen | {id(part)})


def refuse_moving_transforms(metric: object, depends: Callable[[Tensor], bool]) -> None:
    """Refuse distributions whose transforms follow the parameters in a way that autograd does not see.

    Args:
        metric: what the closure returned.
        depends: whether a tensor was computed from the parameters.

    Raises:
        NotImplementedError: there is one; the message names the way out.
    """
    for head in () if metric is None or isinstance(metric, Tensor) else distributions_in(metric):
        inner: Any = head
        while (kind := _kind_of(inner)) in (Independent, TransformedDistribution):
            for transform in inner.transforms if kind is TransformedDistribution else ():
                if any(depends(t) and not t.requires_grad for t in _tensors_in(transform)):
                    raise NotImplementedError(_moving(transform))
            inner = inner.base_dist


def _moving(transform: Transform) -> str:
    return (
        f"the {type(transform).__name__} of the returned distribution changes with the parameters, "
        f"and only the base distribution's can be followed; {USE_FORM_C}"
    )
