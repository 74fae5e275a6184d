"""The root of a metric at the outputs, and its inverse, in diagonal blocks that are found by probing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ngd_optim.curvature.vector_products import Map

_LARGEST_BLOCK = 256


def powers_of_hessian(
    apply_hessian: Map, outputs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]] | None:
    """The diagonal blocks of ``H_z^½`` and of ``H_z^-½``; None if ``H_z`` has negative eigenvalues."""
    halves, inverses = [], []
    for blocks in _blocks(apply_hessian, outputs):
        powers = _powers_of_blocks(blocks)
        if powers is None:
            return None
        halves.append(powers[0].to(dtype))
        inverses.append(powers[1].to(dtype))
    return halves, inverses


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
            # The host waits once a point for each form: other forms take more products.
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
