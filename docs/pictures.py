"""The pictures of the site's own pages, computed by the library itself.

python docs/pictures.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Categorical

from ngd_optim import NaturalCG, conjugate_gradient, linearize, plot_history
from ngd_optim.step.line_search import SUFFICIENT_DECREASE, line_search

FOLDER = Path(__file__).with_name("images")
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"  # Okabe & Ito 2008


def main(folder: Path = FOLDER) -> None:
    """Write all pictures."""
    folder.mkdir(exist_ok=True)
    draw_directions().savefig(folder / "directions.png", dpi=130)
    draw_step().savefig(folder / "step.png", dpi=130)
    draw_history().savefig(folder / "history.png", dpi=110)


def draw_directions() -> Figure:
    """Gradient descent and conjugate gradients on a quadratic, as it is and in preconditioned coordinates."""
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
    matrix = turn @ torch.diag(torch.tensor([1.0, 15.0], dtype=torch.float64)) @ turn.T
    b = matrix @ torch.tensor([1.0, 0.5], dtype=torch.float64)
    roughly = (
        turn @ torch.diag(torch.tensor([1.3, 12.0], dtype=torch.float64)) @ turn.T
    )  # M, near the matrix
    half = torch.linalg.cholesky(roughly)  # M = C Cᵀ; in y = Cᵀx the matrix is C⁻¹ A C⁻ᵀ
    rounder = torch.linalg.solve(half, torch.linalg.solve(half, matrix).T)
    figure = Figure(figsize=(11, 5), layout="constrained")
    titles = (
        "A x = b: ½ xᵀA x − bᵀx has long valleys",
        "Preconditioned: the same problem in y = Cᵀx, with M = C Cᵀ ≈ A",
    )
    systems = (matrix, b), (rounder, torch.linalg.solve(half, b))
    for axes, (a, right), title in zip(figure.subplots(1, 2), systems, titles, strict=True):
        _draw_paths(axes, a, right)
        axes.set_title(title, loc="left", fontsize=10)
    return figure


def _draw_paths(axes: Any, a: Tensor, b: Tensor) -> None:
    solution = torch.linalg.solve(a, b)
    paths = {
        "gradient descent, exact line search": _descent(a, b),
        "conjugate gradients": _conjugate(a, b),
    }
    span = solution.abs().max().item()
    middle, reach = solution / 2, torch.tensor([0.85, 0.6], dtype=torch.float64) * span
    low, high = middle - reach, middle + reach
    grid = torch.meshgrid(
        *(torch.linspace(*ends, 200, dtype=torch.float64) for ends in zip(low, high, strict=True))
    )
    x = torch.stack(grid, -1) - solution
    heights = 0.5 * torch.einsum("ijk,kl,ijl->ij", x, a, x)
    levels = (
        0.5
        * (solution @ a @ solution).item()
        * torch.tensor([0.01, 0.05, 0.15, 0.35, 0.65, 1.0, 1.6])
    )
    axes.contour(*grid, heights, levels=levels, colors="0.8", linewidths=0.9)
    for (name, points), colour, marker in zip(paths.items(), (ORANGE, BLUE), "os", strict=True):
        axes.plot(
            *points.T,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.8,
            label=f"{name}: {_steps(points)}",
        )
    axes.plot(*solution, "*", color="black", markersize=13, label="solution")
    axes.set(aspect="equal", xlabel="first coordinate", ylabel="second coordinate")
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _steps(points: Tensor) -> str:
    return f"{len(points) - 1} steps"


def _descent(a: Tensor, b: Tensor) -> Tensor:
    points = [torch.zeros_like(b)]
    while (r := b - a @ points[-1]).norm() > 0.01 * b.norm():
        points.append(points[-1] + r.dot(r) / r.dot(a @ r) * r)
    return torch.stack(points)


def _conjugate(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack(
        [conjugate_gradient(a.mv, b, max_iters=n).solution for n in range(len(b) + 1)]
    )


def draw_step() -> Figure:
    """One step on Rosenbrock's function: the trust region, and the line search along the direction."""
    start, max_kl, damping = torch.tensor([-0.9, 1.3], dtype=torch.float64), 1.2, 0.01
    theta = torch.nn.Parameter(start.clone())

    def loss(at: Tensor = theta) -> Tensor:
        residuals = torch.stack([1 - at[..., 0], 2 * (at[..., 1] - at[..., 0] ** 2)], -1)
        return 0.5 * F.mse_loss(residuals, torch.zeros_like(residuals), reduction="sum")

    point = linearize(loss, [theta])
    x = conjugate_gradient(lambda v: point.curvature(v) + damping * v, -point.gradient).solution
    xfx = x.dot(point.curvature(x)).item()
    scale = min(1.0, (2 * max_kl / xfx) ** 0.5)
    d, slope = scale * x, scale * point.gradient.dot(x).item()
    tried: list[tuple[float, float]] = []

    def evaluate(fraction: float) -> tuple[float, None]:
        tried.append((fraction, loss(start + fraction * d).item()))
        return tried[-1][1], None

    trial = line_search(
        evaluate,
        point.loss.item(),
        slope,
        max_kl=None,
        max_backtracks=10,
        requires_decrease=True,
        backtrack_ratio=0.8,
    )
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    plane, line = figure.subplots(1, 2)
    _draw_plane(plane, loss, start, x, d, point.curvature, max_kl, tried)
    along = torch.linspace(0, 1.05, 200, dtype=torch.float64)
    line.plot(along, [loss(start + t * d).item() for t in along], color="black", label="loss")
    model = point.loss.item() + along * slope + 0.5 * along**2 * scale**2 * xfx
    line.plot(along, model, "--", color=BLUE, label="quadratic model: loss + gᵀd + ½ dᵀF d")
    enough = point.loss.item() + SUFFICIENT_DECREASE * along * slope
    line.plot(along, enough, ":", color="0.4", label="sufficient decrease")
    *refused, accepted = tried
    line.plot(
        *zip(*refused, strict=True),
        "X",
        color=VERMILION,
        markersize=9,
        label="trial point, turned down",
    )
    line.plot(
        *accepted, "o", color=GREEN, markersize=9, label=f"accepted, {trial.backtracks} backtracks"
    )
    line.set(xlabel="fraction of the step d", ylabel="loss")
    line.set_title("The line search goes back until the loss falls", loc="left", fontsize=10)
    line.legend(frameon=False, fontsize=9)
    line.grid(alpha=0.25)
    return figure


def _draw_plane(
    axes: Any,
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    x: Tensor,
    d: Tensor,
    curvature: Callable[[Tensor], Tensor],
    max_kl: float,
    tried: list[tuple[float, float]],
) -> None:
    ranges = (-2.7, 1.6), (-2.7, 4.6)
    grid = torch.meshgrid(*(torch.linspace(*ends, 150, dtype=torch.float64) for ends in ranges))
    heights = [
        [loss(torch.stack([a, b])).item() for a, b in zip(*row, strict=True)]
        for row in zip(*grid, strict=True)
    ]
    axes.contour(*grid, heights, levels=[0.1, 0.3, 1, 3, 8, 20, 40], colors="0.8", linewidths=0.9)
    matrix = torch.stack([curvature(e) for e in torch.eye(2, dtype=torch.float64)])
    angle = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    edge = start[:, None] + (2 * max_kl) ** 0.5 * torch.linalg.solve(
        torch.linalg.cholesky(matrix).T, circle
    )
    axes.plot(*edge, "--", color=BLUE, label=f"trust region ½ dᵀF d = {max_kl:g}")
    for vector, colour, name in (
        (x, ORANGE, "solution x of (F + λI) x = −g"),
        (d, BLUE, "step d, cut to the region"),
    ):
        end = start + vector
        axes.annotate(
            "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2}
        )
        axes.plot([], [], color=colour, linewidth=2, label=name)
    axes.plot(*(start + tried[-1][0] * d), "o", color=GREEN, markersize=9, label="accepted point")
    axes.plot(*start, "o", color="black", label="current parameters θ")
    axes.plot(1, 1, "*", color="black", markersize=13, label="minimum")
    axes.set(xlabel="θ₁", ylabel="θ₂", xlim=ranges[0], ylim=ranges[1])
    axes.set_title("The trust region limits the step", loc="left", fontsize=10)
    axes.legend(frameon=True, framealpha=0.9, fontsize=8, loc="upper right")


def draw_history() -> Figure:
    """Thirty steps of a classifier with a bound on the KL."""
    torch.manual_seed(0)
    x, y = torch.randn(300, 10, dtype=torch.float64), torch.randint(0, 4, (300,))
    model = torch.nn.Sequential(
        torch.nn.Linear(10, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4)
    ).double()
    optimizer, reports = NaturalCG(model.parameters(), max_kl=0.05), []

    def closure() -> tuple[Tensor, Categorical]:
        logits = model(x)
        return F.cross_entropy(logits, y), Categorical(logits=logits)

    for _ in range(30):
        optimizer.step(closure)
        assert optimizer.last_step is not None
        reports.append(optimizer.last_step)
    return plot_history(reports)


if __name__ == "__main__":
    main()
