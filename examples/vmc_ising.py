"""Variational Monte Carlo finds the ground state of a chain of spins.

    H = −Σ Zᵢ Zᵢ₊₁ − h Σ Xᵢ on a ring, at the critical field h = 1

The wave function is a restricted Boltzmann machine that is the same after a translation (Carleo & Troyer 2017). Each
step is stochastic reconfiguration (Sorella 1998): NaturalCG with the energy as a recognised loss, where `max_kl` bounds
the infidelity of a step. Expectations are sums over all states or, with --samples, come from Metropolis samples.

Run it:

    python examples/vmc_ising.py
    python examples/vmc_ising.py --spins 16 --samples 1000

It compares with Adam on the same gradients, and with the exact energy by diagonalisation.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from ngd_optim import NaturalCG
from ngd_optim.losses import variational_energy

COLORS = {"Adam": "tab:green", "NaturalCG": "tab:blue"}
CHUNK = 2**12


class Ising:
    """The chain: its states as numbers and as spins, and its local energies."""

    def __init__(self, spins: int, field: float) -> None:
        self.spins, self.field = spins, field
        self.states = torch.arange(2**spins)

    def spins_of(self, states: Tensor) -> Tensor:
        """±1 for each spin, (..., spins)."""
        return (1 - 2 * ((states[..., None] >> torch.arange(self.spins)) & 1)).double()

    def flips(self, states: Tensor) -> Tensor:
        """The states with one spin turned, (..., spins)."""
        return states[..., None] ^ (1 << torch.arange(self.spins))

    def bonds(self, states: Tensor) -> Tensor:
        """−Σ Zᵢ Zᵢ₊₁, (...)."""
        x = self.spins_of(states)
        return -(x * x.roll(-1, -1)).sum(-1)

    def local_energy(self, states: Tensor, log_psi: Callable[[Tensor], Tensor]) -> Tensor:
        """(Hψ)(x) / ψ(x)."""
        ratios = (log_psi(self.flips(states)) - log_psi(states)[..., None]).exp()
        return self.bonds(states) - self.field * ratios.sum(-1)

    def ground_energy(self) -> float:
        """By diagonalisation."""
        turned = self.flips(self.states)
        rows = self.states[:, None].expand_as(turned)
        values = torch.cat([self.bonds(self.states), torch.full((turned.numel(),), -self.field)])
        places = (
            torch.cat([self.states, rows.flatten()]),
            torch.cat([self.states, turned.flatten()]),
        )
        matrix = coo_matrix((values.numpy(), (places[0].numpy(), places[1].numpy())))
        return float(eigsh(matrix.tocsr(), k=1, which="SA", return_eigenvectors=False)[0])


class Boltzmann(nn.Module):
    """``log ψ = Σ log cosh(b + W x)`` over some features and all translations."""

    def __init__(self, chain: Ising, features: int) -> None:
        super().__init__()
        self.chain = chain
        self.weight = nn.Parameter(0.05 * torch.randn(features, chain.spins))
        self.bias = nn.Parameter(0.05 * torch.randn(features))
        places = torch.arange(chain.spins)
        self.places = (places[:, None] + places) % chain.spins

    def forward(self, states: Tensor) -> Tensor:
        """``log ψ`` of states, (...)."""
        translated = self.chain.spins_of(states)[..., self.places]
        return (translated @ self.weight.T + self.bias).cosh().log().sum((-2, -1))

    @torch.no_grad()
    def energy(self) -> float:
        """The mean energy, by a sum over all states."""
        parts = self.chain.states.split(CHUNK)
        log_psi = torch.cat([self(part) for part in parts])
        p = (2 * log_psi).softmax(0)
        energies = torch.cat([self.chain.local_energy(part, self) for part in parts])
        return (p @ energies).item()


class Metropolis:
    """Chains of states with the distribution ``|ψ|²``, by turning one spin at a time (Metropolis et al. 1953)."""

    def __init__(self, psi: Boltzmann, count: int) -> None:
        self.psi = psi
        self.states = torch.randint(2**psi.chain.spins, (count,))

    @torch.no_grad()
    def sweep(self, sweeps: int) -> Tensor:
        """The states after so many trials of each spin."""
        now = self.psi(self.states)
        for _ in range(sweeps * self.psi.chain.spins):
            trial = self.states ^ (1 << torch.randint(self.psi.chain.spins, self.states.shape))
            there = self.psi(trial)
            accepted = torch.rand(len(now)) < (2 * (there - now)).exp()
            self.states = torch.where(accepted, trial, self.states)
            now = torch.where(accepted, there, now)
        return self.states


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
        return NaturalCG(psi.parameters(), damping=1e-5, max_backtracks=20, **settings)
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
        states = chain.states if chains is None else chains.sweep(1)

        def closure(states: Tensor = states) -> Tensor:
            optimizer.zero_grad()
            log_psi = psi(states)
            with torch.no_grad():
                energy = chain.local_energy(states, psi)
                weights = None if args.samples else (2 * log_psi).softmax(0)
            loss = variational_energy(log_psi, energy, weights)
            loss.backward()
            return loss

        optimizer.step(closure)
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
    parser.add_argument("--spins", type=int, default=10)
    parser.add_argument("--field", type=float, default=1.0)
    parser.add_argument("--features", type=int, default=4, help="of the Boltzmann machine")
    parser.add_argument("--samples", type=int, default=0, help="0: sums over all states")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    chain = Ising(args.spins, args.field)
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
