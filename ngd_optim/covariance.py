"""Standard errors of fitted parameters, from the curvature of a least-squares loss at its minimum."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric
from ngd_optim.distributed import ALONE
from ngd_optim.kernels import twice_differentiable
from ngd_optim.linearization import Point, linearize_mean
from ngd_optim.parameters import name_parameters
from ngd_optim.tracing import TracedClosure, list_closures

logger = logging.getLogger("ngd_optim")

_SAME = 1e-6
_FAR = 0.1
"""So many standard errors from the minimum, the parameters are not at it."""


@dataclass(frozen=True)
class Covariance:
    """What :func:`estimate_covariance` finds. Vectors are flat, in the order of the parameters.

    Attributes:
        matrix: the covariance of the parameters, shape ``(n, n)``.
        standard_errors: the roots of its diagonal, shape ``(n,)``.
        variance: that of a residual of weight 1, 0-dim: ``Σ r² / (m − n)`` for ``m`` residuals in
            one tensor; 1 with ``absolute_sigma``, NaN with a robust loss. Of complex ones both parts
            count in ``m`` and have half of it each.
        degrees_of_freedom: ``m − n``; residuals of weight 0 do not count in ``m``.

    Examples:
        >>> import torch
        >>> from ngd_optim import estimate_covariance, least_squares
        >>> y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        >>> mean = torch.nn.Parameter(y.mean())
        >>> found = estimate_covariance(lambda: least_squares(mean - y), [mean])
        >>> found.variance.item(), found.degrees_of_freedom
        (1.0, 2)
        >>> round(found.standard_errors.item(), 4)  # (1 / 3)^½
        0.5774
    """

    matrix: Tensor
    standard_errors: Tensor
    variance: Tensor
    degrees_of_freedom: int

    @property
    def correlation(self) -> Tensor:
        """The matrix with its rows and columns divided by the standard errors."""
        return self.matrix / torch.outer(self.standard_errors, self.standard_errors)


def estimate_covariance(
    closure: Callable[[], Any], params: Iterable[Any], *, absolute_sigma: bool = False
) -> Covariance:
    """The covariance of fitted parameters, as ``scipy.optimize.curve_fit`` estimates it.

    It is ``σ² (JᵀJ)⁻¹`` at the minimum, the inverse of the Fisher information of residuals with
    independent errors of the same variance ``σ² = Σ r² / (m − n)``. Weights divide that: a residual
    counts as of variance ``σ² / w``; of several tensors each counts as its share in the loss says.
    With a robust loss it is the sandwich ``H⁻¹ (Σ gᵢgᵢᵀ) H⁻¹ m / (m − n)`` of the gradients ``gᵢ``
    of single residuals and the loss's own second derivatives (Huber & Ronchetti 2009, section 6.3).

    Args:
        closure: returns a sum of :func:`~ngd_optim.least_squares` losses. What is known of the
            parameters beforehand must be residuals as well: a penalty by hand is not seen.
        params: those that were fitted, or pairs of a name and one, in the order in which the flat vectors hold them.
        absolute_sigma: the residuals are divided by their known errors, or have the weights
            ``1 / σ²``: ``σ²`` is 1 in place of an estimate.

    Raises:
        TypeError: ``params`` are no tensors, or pairs of a name and a tensor.
        ValueError: the loss is of another kind or not finite, there are no more residuals than
            parameters, the residuals do not determine the parameters, complex ones have a robust
            loss, or ``absolute_sigma`` is asked for where residuals of several tensors, a robust
            loss, or a factor of the loss do not say what a variance of 1 is.

    Examples:
        >>> import torch
        >>> from ngd_optim import NaturalCG, estimate_covariance, least_squares
        >>> x = torch.arange(5.0, dtype=torch.float64)
        >>> y = torch.tensor([0.1, 0.9, 2.1, 2.9, 4.0], dtype=torch.float64)
        >>> line = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        >>> optimizer = NaturalCG([line])
        >>> def closure():
        ...     return least_squares(line[0] + line[1] * x - y)
        >>> while not optimizer.converged:
        ...     loss = optimizer.step(closure)
        >>> [round(v, 4) for v in estimate_covariance(closure, [line]).standard_errors.tolist()]
        [0.0849, 0.0346]
    """
    parameters, _ = name_parameters(params)
    with twice_differentiable(), torch.enable_grad():
        runs = [TracedClosure(function, parameters) for function in list_closures(closure)]
        point = linearize_mean(parameters, "auto", "auto", {}, ALONE, runs)
        if not (point.is_least_squares and point.kind == "ggn" and point.outputs):
            raise ValueError(
                "estimate_covariance() needs one closure whose loss is least_squares(), or a sum of "
                "such losses; write what else is in the loss, such as a penalty, as residuals of it"
            )
        if not point.is_finite:
            raise ValueError(
                "the loss or its gradient is not finite at the parameters, and tells no errors; fill "
                "missing data with finite numbers, and give them the weight 0"
            )
        root = point.square_root()
        counts = _have_weight(point)
        curvatures = _true_over_model(point, counts)
        factors = _factors(point)
    if root is None:
        raise ValueError("the residuals have negative weights; a variance has none")
    m, n = root.rows.shape
    counted = int(counts.sum())
    if counted <= n:
        raise ValueError(
            f"{counted} residuals leave no degree of freedom for the errors of {n} parameters; give more data, "
            "or fit fewer parameters"
        )
    if absolute_sigma and (curvatures is not None or _tensors_of_residuals(point) > 1):
        raise ValueError(
            "absolute_sigma needs one tensor of residuals with loss='linear': join them by torch.cat, each "
            "divided by its error, and look at the loss without its robust form"
        )
    if absolute_sigma and any(abs(factor - 1) > _SAME for factor in factors):
        raise ValueError(
            f"absolute_sigma needs least_squares() as it is, and the loss has it times {factors[0]:.6g}: "
            "leave the factor out, and give known errors by weights=1 / sigma**2"
        )
    inverse = _invert(root.rows, curvatures)
    if curvatures is None:
        # ‖s‖² = 2 · loss = σ² (counted − n) / m, and F = JᵀJ / m.
        found = root.slope.square().sum() * m / (counted - n)
        variance = torch.ones_like(found) if absolute_sigma else found
        matrix = variance / m * inverse
    else:
        gradients = root.rows * root.slope.unsqueeze(1)
        variance = root.rows.new_full((), torch.nan)
        matrix = counted / (counted - n) * inverse @ (gradients.T @ gradients) @ inverse
    errors = matrix.diagonal().sqrt()
    # A step from here leads to the minimum.
    distance = ((inverse @ (root.rows.T @ root.slope)).abs() / errors).amax().item()
    if distance > _FAR:
        logger.warning(
            "the parameters are some %.2g standard errors from the minimum, where their covariance is "
            "estimated: take more steps before",
            distance,
        )
    return Covariance(matrix, errors, variance, counted - n)


def _invert(A: Tensor, curvatures: Tensor | None) -> Tensor:
    """``(Aᵀ diag(c) A)⁻¹``, by the singular values of ``A`` where ``c`` is 1."""
    sizes = A.norm(dim=0)
    # Units of the parameters do not count.
    _, values, vectors = torch.linalg.svd(A / torch.where(sizes > 0, sizes, 1), full_matrices=False)
    rank = int((values > torch.finfo(A.dtype).eps * max(A.shape) * values[0]).sum())
    if rank < A.shape[1]:
        raise ValueError(
            f"the residuals determine {rank} of {A.shape[1]} directions of the parameters, and the errors "
            "of the others are infinite; leave out or fix what the data do not tell, or add residuals "
            "that hold it"
        )
    half = vectors.T / values
    if curvatures is not None:
        U = A / sizes @ half
        middle, info = torch.linalg.inv_ex(U.T @ (curvatures.unsqueeze(1) * U))
        if info or not (middle.diagonal() > 0).all():
            raise ValueError(
                "the robust loss is not convex at the parameters, which are no minimum of it; take more "
                "steps before, or a larger scale"
            )
        half = half @ torch.linalg.cholesky((middle + middle.T) / 2)
    half = half / sizes.unsqueeze(1)
    return half @ half.T


def _have_weight(point: Point) -> Tensor:
    """Which residuals have a weight above 0, shape (m,): the others are no data."""
    _, metric = point.graph.get()
    assert isinstance(metric, OutputMetric)
    images = metric.apply_hessian([torch.ones_like(z) for z in metric.outputs])
    return torch.cat([image.flatten() for image in images]) != 0


def _factors(point: Point) -> list[float]:
    """By what each call of ``least_squares`` is multiplied in the loss."""
    traced, _ = point.graph.get()
    results = [call.result for call in traced.losses if call.result.requires_grad]
    return [slope.item() for slope in torch.autograd.grad(traced.loss, results, retain_graph=True)]


def _true_over_model(point: Point, counts: Tensor) -> Tensor | None:
    """The second derivatives of a robust loss in its residuals ÷ those of the parabolas; None: it is none."""
    traced, metric = point.graph.get()
    assert isinstance(metric, OutputMetric)
    robust = [c for c in traced.losses if c.arguments.arguments.get("loss", "linear") != "linear"]
    if not robust:
        return None
    if any(r.is_complex() for call in robust for r in call.arguments.arguments["residuals"]):
        raise ValueError(
            "a robust loss of complex residuals couples their two parts, and the errors do not know that; "
            "estimate them with loss='linear', or fit residuals by torch.view_as_real"
        )
    slopes = torch.autograd.grad(traced.loss, metric.outputs, create_graph=True)
    total = torch.stack([slope.sum() for slope in slopes]).sum()
    # Each residual has its own term: the matrix of second derivatives is diagonal.
    true = torch.autograd.grad(total, metric.outputs, retain_graph=True, materialize_grads=True)
    model = metric.apply_hessian([torch.ones_like(z) for z in metric.outputs])
    ratios = torch.cat([(t / h).flatten() for t, h in zip(true, model, strict=True)])
    return torch.where(counts, ratios, 1.0)  # of what has no weight, its row is zero


def _tensors_of_residuals(point: Point) -> int:
    _, metric = point.graph.get()
    return len(metric.outputs)
