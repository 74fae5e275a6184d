"""Draw vectors at the model's outputs whose covariance is the metric there."""

import torch
from torch import Tensor

from ngd_optim.curvature import OutputMetric

_PROBES = 4
_AGREES = 1e-2


@torch.no_grad()
def draw(metric: OutputMetric, generator: torch.Generator) -> list[Tensor]:
    """Random ``u``, shaped like the outputs, with ``E[u uᵀ] = H_z``.

    Two kinds of metric are known by what they do to random signs: diagonal ones (least squares, independent
    likelihoods) and those of a softmax, ``w (diag p − p pᵀ)`` along one dimension, where a class is drawn from the
    predictive distribution. Of any other, only the diagonal counts, as estimated from a few probes (Hutchinson 1990).
    """
    signs = _signs(metric, generator)
    images = metric.weigh(signs)
    sums = metric.weigh([torch.ones_like(z) for z in metric.outputs])
    draws: list[Tensor | None] = []
    for z, s, image, total in zip(metric.outputs, signs, images, sums, strict=True):
        if _close(s * total, image):
            draws.append(s * total.clamp(min=0).sqrt())
        else:
            draws.append(_of_softmax(z.detach(), s, image, generator))
    if any(u is None for u in draws):
        diagonals = _diagonals(metric, generator)
        draws = [s * d.clamp(min=0).sqrt() if u is None else u for u, s, d in zip(draws, signs, diagonals, strict=True)]
    return [u for u in draws if u is not None]


def _of_softmax(z: Tensor, s: Tensor, image: Tensor, generator: torch.Generator) -> Tensor | None:
    """A draw for ``w (diag p − p pᵀ)``, if that is what turned ``s`` into ``image``."""
    for dim in dict.fromkeys((z.ndim - 1, min(1, z.ndim - 1), 0)):
        p = z.softmax(dim)
        unweighted = p * (s - (p * s).sum(dim, keepdim=True))
        spread = (s * unweighted).sum(dim, keepdim=True)
        weight = torch.where(spread > 0, (s * image).sum(dim, keepdim=True) / spread, 0)
        if _close(weight * unweighted, image):
            flat = p.movedim(dim, -1).reshape(-1, p.shape[dim]).to("cpu", torch.float32)
            drawn = torch.multinomial(flat, 1, generator=generator).to(p.device)
            one = torch.zeros_like(p).movedim(dim, -1)
            one = one.scatter(-1, drawn.view(*one.shape[:-1], 1), 1.0).movedim(-1, dim)
            return weight.clamp(min=0).sqrt() * (one - p)
    return None


def _diagonals(metric: OutputMetric, generator: torch.Generator) -> list[Tensor]:
    total = [torch.zeros_like(z) for z in metric.outputs]
    for _ in range(_PROBES):
        signs = _signs(metric, generator)
        for t, s, image in zip(total, signs, metric.weigh(signs), strict=True):
            t.add_(s * image, alpha=1 / _PROBES)
    return total


def _signs(metric: OutputMetric, generator: torch.Generator) -> list[Tensor]:
    return [torch.randint(2, z.shape, generator=generator).mul_(2).sub_(1).to(z) for z in metric.outputs]


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _AGREES * b.norm())
