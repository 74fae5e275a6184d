"""A square root of the curvature: ``A`` with ``F = AᵀA``, for metrics at the model's outputs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric
from ngd_optim.jacobian.jacobian import compute_cheap_jacobian, jacobian
from ngd_optim.parameters import FlatParameters


class SqrtGGN(NamedTuple):
    """The square root of a Gauss-Newton or Fisher matrix, ``F = AᵀA``, and ``g = Aᵀs + …``.

    Attributes:
        rows: ``A``, shape (m, n), a row for each element of the model's outputs.
        slope: ``s``, shape (m,).
        displaced: runs the closure at the parameters as they are then, and gives
            ``H_z^½ (z − z₀)``, by how much the outputs are other than here; None where the closure
            is not defined there.
    """

    rows: Tensor
    slope: Tensor
    displaced: Callable[[], Tensor | None]


def square_root_of(
    metric: OutputMetric,
    loss: Tensor,
    parameters: FlatParameters,
    outputs_now: Callable[[], Sequence[Tensor] | None],
) -> SqrtGGN | None:
    """``A = H_z^½ J``, and ``s = H_z^-½ ∂loss/∂z``; None if ``H_z`` is not positive semidefinite.

    Args:
        metric: of the closure, with its graph.
        loss: likewise.
        parameters: what the Jacobian is taken in.
        outputs_now: the outputs at the parameters as they are then; None where there are none.
    """
    powers = metric.powers(parameters.dtype)
    if powers is None:
        return None
    halves, inverses = powers
    # g = Jᵀ ∂loss/∂z = Aᵀ (H_z^-½ ∂loss/∂z): the gradient in the coordinates of the residuals.
    slopes = torch.autograd.grad(loss, metric.outputs, retain_graph=True, materialize_grads=True)
    rows = jacobian(metric.outputs, parameters)
    slope = _flat(slopes, rows)
    here = _flat(metric.outputs, rows)
    _multiply(halves, rows)
    _multiply(inverses, slope.unsqueeze(1))

    def displaced() -> Tensor | None:
        outputs = outputs_now()
        if outputs is None:
            return None
        change = _flat(outputs, rows).sub_(here)
        _multiply(halves, change.unsqueeze(1))
        return change

    return SqrtGGN(rows, slope, displaced)


def compute_cheap_diagonal(metric: OutputMetric, parameters: FlatParameters) -> Tensor | None:
    """The diagonal of ``F`` from the squares of ``A``; None if that costs more than some products."""
    rows = compute_cheap_jacobian(metric.outputs, parameters)
    powers = None if rows is None else metric.powers(parameters.dtype)
    if rows is None or powers is None:
        return None
    halves, _ = powers
    _multiply(halves, rows)
    return rows.square_().sum(0)


def _flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([t.detach().reshape(-1).to(like) for t in tensors])


def _multiply(blocks: Sequence[Tensor], rows: Tensor) -> None:
    """Multiply rows by a matrix with these diagonal blocks, in place."""
    first = 0
    for block in blocks:
        count, size, _ = block.shape
        part = rows[first : first + count * size]
        if size == 1:
            part.mul_(block.view(-1, 1))
        else:
            part.copy_((block @ part.reshape(count, size, -1)).flatten(0, 1))
        first += count * size
