"""Draw vectors at the model's outputs whose covariance is the metric there."""

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric

_PROBES = 4
_AGREES = 1e-2


@torch.no_grad()
def draw(metric: OutputMetric, generator: torch.Generator) -> list[Tensor]:
    """Random ``u``, shaped like the outputs, with ``E[u uᵀ] = H_z``.

    Two kinds of metric are known by what they do to a random vector: diagonal ones (least squares,
    independent likelihoods) and those of a softmax, ``w (diag p − p pᵀ)`` along one dimension,
    where a class is drawn from the predictive distribution. Of any other, only the diagonal counts,
    as estimated from a few probes (Hutchinson 1990).
    """
    # Normal numbers, and not signs: a metric that turns them into zero is zero.
    probes = [_draw_normal(z, generator) for z in metric.outputs]
    images = metric.apply_hessian(probes)
    sums = metric.apply_hessian([torch.ones_like(z) for z in metric.outputs])
    draws: list[Tensor | None] = []
    for z, v, image, total in zip(metric.outputs, probes, images, sums, strict=True):
        if _close(v * total, image):
            draws.append(v.sign() * total.clamp(min=0).sqrt())
        else:
            draws.append(_draw_from_softmax(z.detach(), v, image, generator))
    if any(u is None for u in draws):
        roots = [d.clamp(min=0).sqrt() for d in _diagonals(metric, generator)]
        draws = [
            v.sign() * root if u is None else u
            for u, v, root in zip(draws, probes, roots, strict=True)
        ]
    return [u for u in draws if u is not None]


def _draw_from_softmax(
    z: Tensor, v: Tensor, image: Tensor, generator: torch.Generator
) -> Tensor | None:
    """A draw for ``w (diag p − p pᵀ)``, if that is what turned ``v`` into ``image``."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    for dim in dict.fromkeys((z.ndim - 1, min(1, z.ndim - 1), 0)):
        p = z.softmax(dim, dtype)
        centred = v - (p * v).sum(dim, keepdim=True)
        variance = (p * centred.square()).sum(dim, keepdim=True)
        weight = torch.where(variance > 0, (centred * image).sum(dim, keepdim=True) / variance, 0)
        if _close(weight * p * centred, image):
            flat = p.movedim(dim, -1).reshape(-1, p.shape[dim])
            # u = √w (e_c − p) for a class c drawn from p has covariance w (diag p − p pᵀ).
            drawn = _draw_class(flat.float(), generator)
            one = torch.zeros_like(p).movedim(dim, -1)
            one = one.scatter(-1, drawn.view(*one.shape[:-1], 1), 1.0).movedim(-1, dim)
            return (weight.clamp(min=0).sqrt() * (one - p)).to(z.dtype)
    return None


def _draw_class(p: Tensor, generator: torch.Generator) -> Tensor:
    """One of each row's classes, (n, 1): the inverse of the distribution function, faster than multinomial."""
    below = p.cumsum(-1)
    uniform = torch.rand(len(p), 1, generator=generator, device=generator.device).to(p)
    return (below <= uniform * below[:, -1:]).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)


def _diagonals(metric: OutputMetric, generator: torch.Generator) -> list[Tensor]:
    total = [torch.zeros_like(z) for z in metric.outputs]
    for _ in range(_PROBES):
        signs = [_draw_normal(z, generator).sign() for z in metric.outputs]
        for t, s, image in zip(total, signs, metric.apply_hessian(signs), strict=True):
            t.add_(s * image, alpha=1 / _PROBES)
    return total


def _draw_normal(z: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(z.shape, generator=generator, device=generator.device).to(z)


def _close(a: Tensor, b: Tensor) -> bool:
    # The host waits, where factors are renewed: which draw is right depends on it.
    return bool((a - b).norm() <= _AGREES * b.norm())
