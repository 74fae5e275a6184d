"""A physics-informed network solves Burgers' equation, whose solution nearly breaks.

    u_t + u u_x = ν u_xx for −1 < x < 1, 0 < t < 1;  u(0, x) = −sin(πx), u(t, ±1) = 0;  ν = 0.01/π

Run it:

    python examples/pinn_burgers.py
    python examples/pinn_burgers.py --seconds 120 --viscosity 0.02

Derivatives are taken by torch.func. The exact solution, for the picture only, is that of Basdevant et al. (1986).
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import jvp

from ngd_optim import NaturalCG, least_squares


def exact(t: Tensor, x: Tensor, viscosity: float) -> Tensor:
    """By the Cole-Hopf transformation; the integrals are Gauss-Hermite sums. ``t`` and ``x`` have the same shape."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite.hermgauss(200))
    y = x.unsqueeze(-1) - nodes * (4 * viscosity * t.unsqueeze(-1)).sqrt()
    exponent = -torch.cos(math.pi * y) / (2 * math.pi * viscosity)
    density = weights * torch.exp(exponent - exponent.amax(-1, keepdim=True))
    return -(density * torch.sin(math.pi * y)).sum(-1) / density.sum(-1)


def derivative(u: Callable[[Tensor], Tensor], direction: Tensor) -> Callable[[Tensor], Tensor]:
    """The derivative of a function along a direction, again a function."""
    return lambda points: jvp(u, (points,), (direction,))[1]


def equation(u: nn.Module, points: Tensor, viscosity: float) -> Tensor:
    """``u_t + u u_x − ν u_xx`` at points (t, x)."""
    along_t, along_x = torch.eye(2).unsqueeze(1).expand(2, len(points), 2)
    u_t = derivative(u, along_t)
    u_x = derivative(u, along_x)
    return u_t(points) + u(points) * u_x(points) - viscosity * derivative(u_x, along_x)(points)


def sample_points(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points (t, x) inside, half of them near the shock; at the start; at the two ends."""
    inside = torch.rand(count, 2) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    inside[::2, 1] = 0.1 * torch.randn(len(inside[::2])).clamp(-3, 3)
    start = torch.stack([torch.zeros(count // 10), torch.linspace(-1, 1, count // 10)], 1)
    ends = torch.stack([torch.rand(count // 20), (torch.arange(count // 20) % 2) * 2.0 - 1.0], 1)
    return inside, start, ends


def draw(u: nn.Module, viscosity: float, errors: list[tuple[float, float]], path: Path) -> None:
    """The solution over time, three moments of it, and how the error fell."""
    t, x = torch.meshgrid(torch.linspace(0.01, 1, 150), torch.linspace(-1, 1, 301), indexing="ij")
    with torch.no_grad():
        found = u(torch.stack([t, x], -1)).squeeze(-1)
    truth = exact(t, x, viscosity)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    image = left.imshow(found.T, origin="lower", extent=(0, 1, -1, 1), aspect="auto", cmap="RdBu_r")
    left.set(title="network", xlabel="t", ylabel="x")
    figure.colorbar(image, ax=left)
    for row, color in ((36, "tab:green"), (74, "tab:orange"), (149, "tab:blue")):
        middle.plot(x[row], truth[row], color=color, linewidth=4, alpha=0.3)
        middle.plot(x[row], found[row], color=color, linewidth=1, label=f"t = {t[row, 0]:.2f}")
    middle.set(title="network (thin), exact (wide)", xlabel="x", ylabel="u")
    middle.legend(frameon=False)
    right.semilogy(*zip(*errors, strict=True))
    right.set(title="relative error in L²", xlabel="CPU seconds, one thread")
    right.grid(alpha=0.3)
    for axes in (middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds to train")
    parser.add_argument("--viscosity", type=float, default=0.01 / math.pi)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("figures/pinn_burgers.png"))
    args = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    u = nn.Sequential(
        nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh()
    )
    u.append(nn.Linear(20, 1))
    inside, start, ends = sample_points(args.points)
    test = torch.rand(2000, 2) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    truth = exact(test[:, 0], test[:, 1], args.viscosity)
    optimizer = NaturalCG(u.parameters())

    def closure() -> Tensor:
        beginning = u(start).squeeze(-1) + torch.sin(math.pi * start[:, 1])
        return least_squares(
            equation(u, inside, args.viscosity), beginning, u(ends), weights=(1.0, 10.0, 10.0)
        )

    errors: list[tuple[float, float]] = []
    spent = 0.0
    while spent < args.seconds:
        began = time.process_time()
        optimizer.step(closure)
        spent += time.process_time() - began
        with torch.no_grad():
            errors.append((spent, ((u(test).squeeze(-1) - truth).norm() / truth.norm()).item()))
        report = optimizer.last_step
        assert report is not None
        if len(errors) % 20 == 0:
            print(
                f"{spent:4.0f} s, step {len(errors)}: loss {report.new_loss:.1e}, error {errors[-1][1]:.1e}"
            )
    draw(u, args.viscosity, errors, args.figure)
    print(f"relative error {errors[-1][1]:.1e} after {len(errors)} steps; {args.figure}")


if __name__ == "__main__":
    main()
