"""Variational Monte Carlo finds the ground state of a ring of spins.

    H = −Σ Zᵢ Zᵢ₊₁ − h Σ (cos φ Xᵢ + sin φ Yᵢ)

The wave function is a restricted Boltzmann machine that is the same after a translation (Carleo & Troyer 2017). Each
step is stochastic reconfiguration (Sorella 1998): NaturalCG with the energy as a recognised loss, where `max_kl` bounds
the infidelity of a step. Expectations are sums over all states, of which those that differ by a translation are one;
with --samples they come from Metropolis samples. Where the field is turned away from X, by --angle, the wave function
has phases, and the machine complex parameters.

Run it:

    python examples/vmc_ising.py
    python examples/vmc_ising.py --spins 16 --angle 60
    python examples/vmc_ising.py --spins 16 --samples 1000

It compares with Adam on the same gradients, and with the exact energy, which no angle changes.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ngd_optim import NaturalCG
from ngd_optim.losses import variational_energy

COLORS = {"Adam": "tab:green", "NaturalCG": "tab:blue"}


class Ising:
    """The ring: its states as numbers and as spins, and its local energies.

    ``orbits`` has one state of all that a translation makes of it, ``sizes`` how many these are, and ``turned`` the
    place in ``orbits`` of what each becomes when a spin is turned, (orbits, spins).
    """

    def __init__(self, spins: int, field: float, angle: float) -> None:
        self.spins, self.field, self.angle = spins, field, angle
        states = torch.arange(2**spins)
        moved = states.clone()
        first = states.clone()
        for _ in range(spins):
            moved = (moved >> 1) | ((moved & 1) << (spins - 1))
            first = torch.minimum(first, moved)
        self.orbits, place, sizes = first.unique(return_inverse=True, return_counts=True)
        self.sizes = sizes.double()
        self.turned = place[self.flips(self.orbits)]

    def spins_of(self, states: Tensor) -> Tensor:
        """±1 for each spin, (..., spins)."""
        return (1 - 2 * ((states[..., None] >> torch.arange(self.spins)) & 1)).double()

    def flips(self, states: Tensor) -> Tensor:
        """The states with one spin turned, (..., spins)."""
        return states[..., None] ^ (1 << torch.arange(self.spins))

    def local_energy(self, states: Tensor, here: Tensor, turned: Tensor) -> Tensor:
        """(Hψ)(x) / ψ(x), from ``log ψ`` at some states and at their flips."""
        x = self.spins_of(states)
        ratios = (turned - here[..., None]).exp()
        if self.angle:
            ratios = ratios * torch.polar(torch.ones_like(x), -self.angle * x)
        return -(x * x.roll(-1, -1)).sum(-1) - self.field * ratios.sum(-1)

    def ground_energy(self) -> float:
        """By free fermions (Pfeuty 1970), for an even number of spins."""
        k = math.pi * (2 * torch.arange(self.spins) + 1) / self.spins
        return -(1 + self.field**2 - 2 * self.field * k.cos()).sqrt().sum().item()


class Boltzmann(nn.Module):
    """``log ψ = Σ a x + Σ log cosh(b + W x)`` over some features and all translations."""

    def __init__(self, chain: Ising, features: int) -> None:
        super().__init__()
        self.chain = chain
        dtype = torch.complex128 if chain.angle else torch.float64
        self.slope = nn.Parameter(0.05 * torch.randn((), dtype=dtype))
        self.weight = nn.Parameter(0.05 * torch.randn(features, chain.spins, dtype=dtype))
        self.bias = nn.Parameter(0.05 * torch.randn(features, dtype=dtype))
        places = torch.arange(chain.spins)
        self.places = (places[:, None] + places) % chain.spins

    def forward(self, states: Tensor) -> Tensor:
        """``log ψ`` of states, (...)."""
        x = self.chain.spins_of(states).to(self.weight.dtype)
        hidden = x[..., self.places] @ self.weight.T + self.bias
        return self.slope * x.sum(-1) + hidden.cosh().log().sum((-2, -1))

    @torch.no_grad()
    def energy(self) -> float:
        """The mean energy, by a sum over all states."""
        energies, weights = sum_over_states(self.chain, self(self.chain.orbits))
        return (weights @ energies.real / weights.sum()).item()


def sum_over_states(chain: Ising, log_psi: Tensor) -> tuple[Tensor, Tensor]:
    """The local energy of each orbit, and its probability."""
    probability = (2 * log_psi.real).softmax(0)
    return chain.local_energy(chain.orbits, log_psi, log_psi[chain.turned]), (
        chain.sizes * probability
    )


class Metropolis:
    """Chains of states with the distribution ``|ψ|²``, by turning one spin at a time (Metropolis et al. 1953)."""

    def __init__(self, psi: Boltzmann, count: int) -> None:
        self.psi = psi
        self.states = torch.randint(2**psi.chain.spins, (count,))

    @torch.no_grad()
    def sweep(self, sweeps: int) -> Tensor:
        """The states after so many trials of each spin."""
        now = self.psi(self.states).real
        for _ in range(sweeps * self.psi.chain.spins):
            trial = self.states ^ (1 << torch.randint(self.psi.chain.spins, self.states.shape))
            there = self.psi(trial).real
            accepted = torch.rand(len(now)) < (2 * (there - now)).exp()
            self.states = torch.where(accepted, trial, self.states)
            now = torch.where(accepted, there, now)
        return self.states


def make_closure(
    chain: Ising, psi: Boltzmann, optimizer: Any, samples: Tensor | None
) -> Callable[[], Tensor]:
    """The energy, from samples or by a sum over all states."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_psi = psi(chain.orbits if samples is None else samples)
        with torch.no_grad():
            if samples is None:
                energy, weights = sum_over_states(chain, log_psi)
            else:
                energy = chain.local_energy(samples, log_psi, psi(chain.flips(samples)))
                weights = None
        loss = variational_energy(log_psi, energy, weights)
        loss.backward()
        return loss

    return closure


def make_optimizer(method: str, psi: nn.Module, *, exact_sums: bool) -> Any:
    """Sums over all states allow full steps and a line search; samples want shorter steps, each with its own noise."""
    if method == "Adam":
        return torch.optim.Adam(psi.parameters(), lr=0.01)
    settings = {
        "max_kl": 0.05,
        "adapt_damping": False,
        "cg_progress_tol": 0.0,
        "preconditioner": None,
    }
    if exact_sums:
        return NaturalCG(psi.parameters(), damping=1e-3, cg_tol=1e-4, max_backtracks=20, **settings)
    return NaturalCG(psi.parameters(), lr=0.2, damping=1e-2, max_backtracks=0, **settings)


def train(
    method: str, chain: Ising, args: argparse.Namespace, exact: float
) -> list[tuple[float, float]]:
    """After which times the energy's relative error was how large."""
    torch.manual_seed(args.seed)
    psi = Boltzmann(chain, args.features)
    chains = Metropolis(psi, args.samples) if args.samples else None
    if chains is not None:
        chains.sweep(10)
    optimizer = make_optimizer(method, psi, exact_sums=chains is None)
    curve, spent = [], 0.0
    for _ in range(args.steps):
        start = time.process_time()
        samples = None if chains is None else chains.sweep(1)
        optimizer.step(make_closure(chain, psi, optimizer, samples))
        spent += time.process_time() - start
        curve.append((spent, (psi.energy() - exact) / abs(exact)))
    return curve


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """The error against steps, and against time."""
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method, curve in curves.items():
        seconds, errors = zip(*curve, strict=True)
        label = f"{method}: {errors[-1]:.1e}"
        left.semilogy(range(1, len(errors) + 1), errors, color=COLORS[method], label=label)
        right.semilogy(seconds, errors, color=COLORS[method])
    left.set(xlabel="steps", ylabel="relative error of the energy")
    right.set(xlabel="CPU seconds, one thread")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with both methods, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spins", type=int, default=10, help="an even number")
    parser.add_argument("--field", type=float, default=1.0)
    parser.add_argument("--angle", type=float, default=0.0, help="of the field to X, in degrees")
    parser.add_argument("--features", type=int, default=4, help="of the Boltzmann machine")
    parser.add_argument("--samples", type=int, default=0, help="0: sums over all states")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    chain = Ising(args.spins, args.field, math.radians(args.angle))
    exact = chain.ground_energy()
    print(f"exact energy: {exact:.8f}")
    curves = {}
    for method in COLORS:
        curves[method] = train(method, chain, args, exact)
        seconds, error = curves[method][-1]
        print(
            f"{method}: relative error {error:.1e} after {args.steps} steps, {seconds:.0f} seconds"
        )
    draw(curves, args.figure)
    print(args.figure)


if __name__ == "__main__":
    main()
