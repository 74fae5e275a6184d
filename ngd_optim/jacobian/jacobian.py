"""The Jacobian of a model's outputs: from one pull-back where each output belongs to one sample, else row by row."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ngd_optim.curvature import pull_back
from ngd_optim.jacobian.per_sample import NotLocalError, Samples
from ngd_optim.parameters import FlatParameters
from ngd_optim.recording import CannotReplayError

logger = logging.getLogger("ngd_optim")

_FEW_ROWS = 32
"""So many rows are sooner pulled back than told apart."""

_ROWS_AT_ONCE = 32
"""So many are pulled back together: each has the memory of a backward pass."""

_FEW_BYTES = 2**27
"""So large a Jacobian is no burden beside what a step holds anyway."""


def jacobian(outputs: Sequence[Tensor], parameters: FlatParameters) -> Tensor:
    """``∂z/∂θ``, shape (number of output elements, n), rows in the order of the flattened outputs."""
    rows = _empty(outputs, parameters)
    if len(rows) <= _FEW_ROWS:
        _fill_by_rows(rows, outputs, parameters)
        return rows
    try:
        Samples(outputs, parameters).fill(rows)
        _check(rows, outputs, parameters)
    except (NotLocalError, CannotReplayError) as error:
        logger.info("the Jacobian is pulled back row by row, because %s", error)
        _fill_by_rows(rows, outputs, parameters)
    return rows


def quick_jacobian(outputs: Sequence[Tensor], parameters: FlatParameters) -> Tensor | None:
    """The same where it is small and takes one pull-back, or has a few rows; else None."""
    count = sum(z.numel() for z in outputs)
    if count * parameters.size * parameters.dtype.itemsize > _FEW_BYTES:
        return None
    if count <= _FEW_ROWS:
        return jacobian(outputs, parameters)
    rows = _empty(outputs, parameters)
    try:
        Samples(outputs, parameters).fill(rows, in_one_pass=True)
        _check(rows, outputs, parameters)
    except (NotLocalError, CannotReplayError):
        return None
    return rows


def _empty(outputs: Sequence[Tensor], parameters: FlatParameters) -> Tensor:
    shape = sum(z.numel() for z in outputs), parameters.size
    return torch.zeros(shape, dtype=parameters.dtype, device=parameters.device)


def _check(rows: Tensor, outputs: Sequence[Tensor], parameters: FlatParameters) -> None:
    generator = torch.Generator().manual_seed(0)
    u = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z) for z in outputs]
    exact = parameters.flatten(pull_back(outputs, parameters.tensors)(u))
    found = rows.T @ torch.cat([part.reshape(-1) for part in u]).to(rows)
    eps = max(torch.finfo(t.dtype).eps for t in [*outputs, *parameters.tensors])
    if not (found - exact).norm() <= eps**0.5 * exact.norm():
        raise NotLocalError("samples share more than the parameters")


def _fill_by_rows(rows: Tensor, outputs: Sequence[Tensor], parameters: FlatParameters) -> None:
    """Pull back unit vectors, several at once where torch can."""
    start = 0
    for z in outputs:
        for first in range(0, z.numel(), _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, z.numel() - first)
            u = torch.zeros(count, z.numel(), dtype=z.dtype, device=z.device)
            u[:, first : first + count].fill_diagonal_(1)
            rows[start + first : start + first + count] = _pull_rows(z, u.view(count, *z.shape), parameters)
        start += z.numel()


def _pull_rows(z: Tensor, u: Tensor, parameters: FlatParameters) -> Tensor:
    def pulled(u: Tensor, batched: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            z, parameters.tensors, u, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    try:
        gradients = pulled(u, True)
    except RuntimeError:  # torch.vmap does not know an operation
        return torch.stack([parameters.flatten(pulled(row, False)) for row in u])
    parts = [
        p.new_zeros(len(u), p.numel()) if g is None else g.reshape(len(u), -1)
        for p, g in zip(parameters.tensors, gradients, strict=True)
    ]
    return torch.cat([part.to(parameters.dtype) for part in parts], 1)
