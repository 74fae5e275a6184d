"""A physics-informed network solves Poisson's equation to eight digits.

    −Δu = 2π² sin(πx) sin(πy) on the unit square, u = 0 at its edge;  solution sin(πx) sin(πy)

Run it:

    python examples/pinn_poisson.py
    python examples/pinn_poisson.py --seconds 60 --hidden 64 64 48 48

It trains the same network with Adam, L-BFGS and NaturalCG for the same time, and draws the solution, its error and how
that fell.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from ngd_optim import NaturalCG, least_squares

COLORS = {"Adam": "tab:green", "L-BFGS": "tab:orange", "NaturalCG": "tab:blue"}


def exact(x: Tensor) -> Tensor:
    """The solution at points of shape (…, 2)."""
    return torch.sin(math.pi * x).prod(-1, keepdim=True)


def network(hidden: Sequence[int]) -> nn.Sequential:
    """From (x, y) to u, with tanh between."""
    layers: list[nn.Module] = []
    for size, following in pairwise([2, *hidden, 1]):
        layers += [nn.Linear(size, following), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def laplacian(u: nn.Module, x: Tensor) -> Tensor:
    """``Δu`` by differentiating twice."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
    bends = [
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    ]
    return torch.stack(bends, 1).sum(1, keepdim=True)


def sample_points(interior: int, edge: int) -> tuple[Tensor, Tensor]:
    """Random points in the square and on its four sides."""
    along, sides = torch.rand(edge), torch.arange(edge) % 4
    boundary = torch.stack([along, (sides % 2).double()], 1)
    return torch.rand(interior, 2), torch.where(
        (sides < 2).unsqueeze(1), boundary, boundary.flip(1)
    )


def train(
    method: str, hidden: Sequence[int], seed: int, seconds: float
) -> tuple[nn.Module, list[tuple[float, float]]]:
    """Train for some seconds; returns the network, and after which times its error was how large."""
    torch.manual_seed(seed)
    u = network(hidden)
    inside, edge = sample_points(900, 120)
    test = torch.rand(5000, 2)

    def loss() -> Tensor:
        equation = laplacian(u, inside) + 2 * math.pi**2 * exact(inside)
        return least_squares(equation, u(edge), weights=(1.0, 100.0))

    step = stepper(method, u, loss)
    curve, spent = [], 0.0
    while spent < seconds:
        start = time.process_time()
        step()
        spent += time.process_time() - start
        if not curve or spent > 1.05 * curve[-1][0]:
            with torch.no_grad():
                curve.append((spent, (u(test) - exact(test)).square().mean().sqrt().item()))
    return u, curve


def stepper(method: str, u: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
    """One step of a method, as a function to call again and again."""
    if method == "NaturalCG":
        optimizer = NaturalCG(u.parameters())
        return lambda: optimizer.step(loss)
    if method == "L-BFGS":
        optimizer = torch.optim.LBFGS(
            u.parameters(), max_iter=10, history_size=50, line_search_fn="strong_wolfe"
        )
    else:
        optimizer = torch.optim.Adam(u.parameters(), lr=3e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    return lambda: optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]


def draw(u: nn.Module, curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """The solution, the network, their difference; and error against time."""
    line = torch.linspace(0, 1, 101)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    with torch.no_grad():
        found = u(grid).squeeze(-1)
    truth = exact(grid).squeeze(-1)
    error = (found - truth).abs()
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1)).tolist()  # pyright: ignore[reportAttributeAccessIssue]
    norm = LogNorm(max(error.max().item() / 1e3, 1e-16), error.max().item())
    pictures = [
        ("exact solution", truth, {}),
        ("network", found, {}),
        ("|network − exact|", error, {"norm": norm}),
    ]
    for axes, (title, values, style) in zip(above.subplots(1, 3), pictures, strict=True):
        image = axes.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap="viridis", **style)
        axes.set(title=title, xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        above.colorbar(image, ax=axes, shrink=0.85)
    axes = below.subplots()
    for method, curve in curves.items():
        axes.loglog(
            *zip(*curve, strict=True), color=COLORS[method], label=f"{method}: {curve[-1][1]:.1e}"
        )
    axes.set(
        xlabel="CPU seconds, one thread",
        ylabel="RMS error",
        title="error of the solution while training",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with each method, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="CPU seconds for each method")
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[64], help="sizes of the hidden layers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/pinn_poisson.png"))
    args = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    runs = {}
    for method in COLORS:
        runs[method] = train(method, args.hidden, args.seed, args.seconds)
        print(f"{method}: RMS error {runs[method][1][-1][1]:.1e} after {args.seconds:g} seconds")
    draw(runs["NaturalCG"][0], {method: curve for method, (_, curve) in runs.items()}, args.figure)
    print(args.figure)


if __name__ == "__main__":
    main()
