"""A square root of the curvature: ``A`` with ``F = AᵀA``, for metrics at the model's outputs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric
from ngd_optim.jacobian.jacobian import compute_cheap_jacobian, jacobian
from ngd_optim.parameters import FlatParameters

_LARGEST_BLOCK = 256


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
    powers = _powers(metric, parameters.dtype)
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
    powers = None if rows is None else _powers(metric, parameters.dtype)
    if rows is None or powers is None:
        return None
    halves, _ = powers
    _multiply(halves, rows)
    return rows.square_().sum(0)


def _powers(metric: OutputMetric, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]] | None:
    """The diagonal blocks of ``H_z^½`` and of ``H_z^-½``; None if ``H_z`` has negative eigenvalues."""
    halves, inverses = [], []
    for blocks in _blocks(metric.apply_hessian, metric.outputs):
        powers = _powers_of_blocks(blocks)
        if powers is None:
            return None
        halves.append(powers[0].to(dtype))
        inverses.append(powers[1].to(dtype))
    return halves, inverses


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


def _blocks(
    apply_hessian: Callable[[Sequence[Tensor]], Sequence[Tensor]], outputs: Sequence[Tensor]
) -> list[Tensor]:
    """``H_z`` as diagonal blocks, shape (count, size, size), that cover the flattened outputs one after another.

    Tried are single elements, then the elements of one sample, then everything as one block.
    """
    sizes = [z.numel() for z in outputs]

    def product(flat: Tensor) -> Tensor:
        pieces = [
            part.view(z.shape).to(z.dtype)
            for part, z in zip(flat.split(sizes), outputs, strict=True)
        ]
        return torch.cat([part.reshape(-1).to(flat) for part in apply_hessian(pieces)])

    per_sample = [z.numel() // z.shape[0] if z.ndim else 1 for z in outputs]
    generator = torch.Generator(device="cpu").manual_seed(0)
    # A random vector tells whether blocks of a shape are all of H_z.
    probe = torch.randn(sum(sizes), generator=generator, dtype=torch.float64, device="cpu").to(
        outputs[0]
    )
    truth = product(probe)
    eps = max(torch.finfo(z.dtype).eps for z in outputs)
    for shape in ([1] * len(outputs), per_sample):
        if max(shape) <= _LARGEST_BLOCK:
            blocks = _block_columns(product, sizes, shape, probe)
            parts = zip(blocks, probe.split(sizes), strict=True)
            found = torch.cat([(b @ part.view(len(b), -1, 1)).reshape(-1) for b, part in parts])
            if (found - truth).norm() <= eps**0.75 * truth.norm():
                return blocks
    everything = torch.stack(
        [product(row) for row in torch.eye(sum(sizes), dtype=probe.dtype, device=probe.device)]
    )
    return [everything.unsqueeze(0)]


def _block_columns(
    product: Callable[[Tensor], Tensor], sizes: list[int], shape: list[int], like: Tensor
) -> list[Tensor]:
    columns: list[list[Tensor]] = [[] for _ in sizes]
    for column in range(max(shape)):
        units = [
            torch.zeros(size // block, block, dtype=like.dtype, device=like.device)
            for size, block in zip(sizes, shape, strict=True)
        ]
        for unit in units:
            unit[:, column : column + 1] = 1
        images = product(torch.cat([unit.reshape(-1) for unit in units])).split(sizes)
        for i, (image, block) in enumerate(zip(images, shape, strict=True)):
            if column < block:
                columns[i].append(image.view(-1, block))
    return [torch.stack(part, 2) for part in columns]


def _powers_of_blocks(blocks: Tensor) -> tuple[Tensor, Tensor] | None:
    """The symmetric root of each block and its pseudo-inverse; None if an eigenvalue is negative."""
    if blocks.shape[-1] == 1:
        values, vectors = blocks[..., 0], torch.ones_like(blocks)
    else:
        wide = blocks.to(torch.promote_types(blocks.dtype, torch.float32))  # eigh knows no bfloat16
        values, vectors = (t.to(blocks.dtype) for t in torch.linalg.eigh((wide + wide.mT) / 2))
    largest = values.abs().amax(-1, keepdim=True)
    floor = torch.finfo(values.dtype).eps * values.shape[-1] * largest
    # A saturated block is rounding of the others' size; beside them it is no negative curvature. The host
    # waits once a point: an indefinite F has no square root.
    if (values < -1e3 * floor.amax()).any():
        return None
    roots = values.clamp(min=0).sqrt()
    inverse = torch.where(values > floor, 1 / roots, 0.0)
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT, (
        vectors * inverse.unsqueeze(-2)
    ) @ vectors.mT
