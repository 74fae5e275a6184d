"""The energy of a wave function as a loss that the optimizer recognises (variational Monte Carlo)."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def variational_energy(
    log_psi: Tensor, local_energy: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The energy ``Re Ē`` of a wave function ``ψ`` from samples of ``|ψ|²``, a 0-dim tensor (variational Monte Carlo).

    Its gradient is ``2 Re ⟨(E − Ē)* ∂log ψ⟩``, and its recognised metric ``2 Re cov(∂log ψ)``: a step is
    stochastic reconfiguration (Sorella 1998), and ``max_kl`` bounds the infidelity ``½ dᵀF d`` between
    the states before and after it. With ``solver="sample"`` the system is solved in the space of the
    samples (MinSR: Chen & Heyl 2024).

    Trial points of a step have other energies ``E``, which are computed anew, and other
    probabilities: the samples are weighed by ``|ψ′/ψ|²``.

    Args:
        log_psi: ``log ψ`` of each sample, real or complex, shape ``(samples,)``.
        local_energy: ``E = (Hψ)(x) / ψ(x)`` of each, real or complex, of the same shape. It may be
            computed under ``no_grad``.
        weights: how much each sample counts, at least 0, of the same shape; None: as much as any
            other. ``|ψ|²`` where the samples are all states.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes do not fit, there is no sample, or a weight is below 0.

    Examples:
        >>> import torch
        >>> from ngd_optim import NaturalCG
        >>> from ngd_optim.losses import variational_energy
        >>> H = torch.tensor([[0.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)  # two states
        >>> log_psi = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        >>> optimizer = NaturalCG([log_psi], damping=1e-3)
        >>> def closure():
        ...     with torch.no_grad():
        ...         psi = log_psi.exp()
        ...         energy = H @ psi / psi
        ...     return variational_energy(1 * log_psi, energy, psi**2)
        >>> for _ in range(20):
        ...     loss = optimizer.step(closure)
        >>> torch.allclose(loss, torch.linalg.eigvalsh(H)[0], atol=1e-6)
        True
    """
    given = [t for t in (log_psi, local_energy, weights) if isinstance(t, Tensor)]
    if has_torch_function(given):
        return handle_torch_function(
            variational_energy, given, log_psi, local_energy, weights=weights
        )
    _check_samples(log_psi, local_energy, weights)
    share = sample_shares(log_psi, weights)
    # What is detached is a constant of the step: at trial points this is log ψ′ − log ψ.
    change = log_psi - log_psi.detach()
    moved = change.real if change.is_complex() else change
    return _Energy.apply(2 * moved + share.log(), change, local_energy)


def sample_shares(log_psi: Tensor, weights: Tensor | None) -> Tensor:
    """The weights, adding up to 1."""
    if weights is None:
        real = log_psi.real if log_psi.is_complex() else log_psi
        return torch.full_like(real.detach(), 1 / len(log_psi))
    # Elsewhere than on a CPU the host would wait to ask: the loss is then NaN.
    weights = torch.where(weights < 0, torch.nan, weights).detach()
    return weights / weights.sum()


class _Energy(torch.autograd.Function):
    """``Re Σ p E`` for ``p ∝ exp(log_p)``, with the gradient ``2 p (E − Ē)`` in ``log ψ``.

    The energies' own derivatives have no part in it: in the mean over ``|ψ|²`` they add nothing, as H
    is Hermitian, and samples make noise of them. As a Function, whose inputs are computed anew at
    trial points, it has them in the value.
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, change: Tensor, energy: Tensor) -> Tensor:
        p = log_p.softmax(0)
        mean = (p * energy).sum()
        slope = 2 * p * (energy - mean)
        if slope.is_complex() and not change.is_complex():
            slope = slope.real
        ctx.save_for_backward(slope)
        return mean.real if mean.is_complex() else mean.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return None, gradients[0] * slope, None


def _check_samples(log_psi: Any, local_energy: Any, weights: Any) -> None:
    for name, t in (("log_psi", log_psi), ("local_energy", local_energy)):
        if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a real or complex tensor, got {kind}")
    if log_psi.ndim != 1 or not len(log_psi) or local_energy.shape != log_psi.shape:
        raise ValueError(
            "log_psi and local_energy must have the same shape, (samples,), got "
            f"{tuple(log_psi.shape)} and {tuple(local_energy.shape)}"
        )
    if weights is None:
        return
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a real tensor or None, got {kind}")
    if weights.shape != log_psi.shape:
        raise ValueError(
            f"weights must have the shape of log_psi, {tuple(log_psi.shape)}, got {tuple(weights.shape)}"
        )
    if weights.device.type == "cpu" and (weights < 0).any():
        raise ValueError(f"weights must be at least 0, got {weights.min().item():g}")
