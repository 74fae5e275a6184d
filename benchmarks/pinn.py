"""Physics-informed networks: error of the solution after the same CPU time for each method.

    python benchmarks/pinn.py                       # 20 seconds per method, one seed
    python benchmarks/pinn.py --seconds 60 --seeds 3
    python benchmarks/pinn.py --problems heat-1d --methods NaturalCG Adam

All methods minimise the same loss, ``½ mean(equation²) + ½ · 100 · mean(boundary²)``, in float64 from the same start on
one thread. The equations of pinn_problems.py have start and period built in, and their error is relative, in L²; their
points are drawn anew now and then, where the residual is large: every 5 steps of NaturalCG, every 500 of the others.
Runs found in results/pinn.json are not repeated; the table and the figure show all of them. Times are that thread's
CPU time, which other processes disturb least; measuring the error is not counted.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import torchmin
from matplotlib.figure import Figure
from pinn_problems import PROBLEMS as IN_TIME
from ssbroyden import SSBroyden
from timing import machine
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ngd_optim import NaturalCG, least_squares

RESULTS = Path(__file__).parent / "results"
BOUNDARY_WEIGHT = 100.0
TEST_POINTS = 10_000
CURVE_POINTS = 60
COLORS = {
    "NaturalCG": "tab:blue",
    "L-BFGS": "tab:orange",
    "Adam": "tab:green",
    "pytorch-minimize": "tab:red",
    "torch-levenberg-marquardt": "tab:purple",
    "SSBroyden": "tab:brown",
}


def second_derivatives(u: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``∂u/∂xᵢ`` and ``∂²u/∂xᵢ²``, shape (points, dimensions), as most codes compute them."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(u(x).sum(), x, create_graph=True)
    columns = [
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i]
        for i in range(x.shape[1])
    ]
    return slope, torch.stack(columns, 1)


def second_derivatives_by_forward_mode(
    u: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in a form that ``torch.func.jacrev`` can differentiate."""
    slopes, bends = [], []
    for unit in torch.eye(x.shape[1]).to(x):
        direction = unit.expand_as(x)
        slope, bend = jvp(lambda y, d=direction: jvp(u, (y,), (d,))[1], (x,), (direction,))
        slopes.append(slope.squeeze(-1))
        bends.append(bend.squeeze(-1))
    return torch.stack(slopes, -1), torch.stack(bends, -1)


@dataclass(frozen=True)
class Equation:
    """A differential equation on the unit cube with a known solution.

    Attributes:
        exact: the solution, (points, dimensions) → (points, 1).
        residual: (points, slopes, second derivatives) → residual of the equation, shape (points,).
        dimensions, interior, boundary: of the cube; how many points.
        on_boundary: moves random points of the cube to where the solution is given.
    """

    exact: Callable[[Tensor], Tensor]
    residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    dimensions: int
    interior: int
    boundary: int
    on_boundary: Callable[[Tensor], Tensor]


def to_faces(x: Tensor) -> Tensor:
    """Each point to a face of the cube, in turn."""
    x, rows = x.clone(), torch.arange(len(x))
    faces = rows % (2 * x.shape[1])
    x[rows, faces // 2] = (faces % 2).to(x)
    return x


def to_start_and_ends(x: Tensor) -> Tensor:
    """Points (t, x): a third each to t = 0, x = 0 and x = 1."""
    x, kind = x.clone(), torch.arange(len(x)) % 3
    x[kind == 0, 0], x[kind == 1, 1], x[kind == 2, 1] = 0.0, 0.0, 1.0
    return x


def heat(x: Tensor) -> Tensor:
    """``exp(−π²t/4) sin(πx)`` at points (t, x)."""
    return torch.exp(-(math.pi**2) * x[:, :1] / 4) * torch.sin(math.pi * x[:, 1:])


def sines(x: Tensor) -> Tensor:
    """``Π sin(πxᵢ)``."""
    return torch.sin(math.pi * x).prod(-1, keepdim=True)


def cosines(x: Tensor) -> Tensor:
    """``Σ cos(πxᵢ)``."""
    return torch.cos(math.pi * x).sum(-1, keepdim=True)


POISSON_2D = Equation(
    sines,
    lambda x, _, bend: bend.sum(-1) + 2 * math.pi**2 * sines(x).squeeze(-1),
    2,
    900,
    120,
    to_faces,
)
POISSON_5D = Equation(
    cosines,
    lambda x, _, bend: bend.sum(-1) + math.pi**2 * cosines(x).squeeze(-1),
    5,
    3000,
    500,
    to_faces,
)
HEAT = Equation(
    heat, lambda _, slope, bend: slope[..., 0] - bend[..., 1] / 4, 2, 900, 120, to_start_and_ends
)
PROBLEMS = {
    "poisson-2d, 257": (POISSON_2D, [2, 64, 1]),
    "poisson-2d, 9873": (POISSON_2D, [2, 64, 64, 48, 48, 1]),
    "poisson-5d, 449": (POISSON_5D, [5, 64, 1]),
    "heat-1d, 257": (HEAT, [2, 64, 1]),
}


EVERY = [*PROBLEMS, *IN_TIME]


class Task:
    """One run: points, network, loss and error."""

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.equation, sizes = PROBLEMS[name]
        layers: list[nn.Module] = []
        for size, following in pairwise(sizes):
            layers += [nn.Linear(size, following), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])
        self.inside = torch.rand(self.equation.interior, self.equation.dimensions)
        self.edge = self.equation.on_boundary(
            torch.rand(self.equation.boundary, self.equation.dimensions)
        )
        self.given = self.equation.exact(self.edge)
        self._test = torch.rand(TEST_POINTS, self.equation.dimensions)
        self._truth = self.equation.exact(self._test)

    def residuals(self, u: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Of the equation and of the boundary values."""
        u = u or self.net
        return self.equation.residual(self.inside, *second_derivatives(u, self.inside)), u(
            self.edge
        ) - self.given

    def loss(self) -> Tensor:
        """What all methods minimise."""
        return least_squares(*self.residuals(), weights=(1.0, BOUNDARY_WEIGHT))

    def renew(self, steps: int, every: int) -> bool:
        """They have the same points all the time."""
        return False

    @torch.no_grad()
    def error(self) -> float:
        """Root mean square over test points."""
        return (self.net(self._test) - self._truth).square().mean().sqrt().item()


class TaskInTime:
    """The same for an equation in time of pinn_problems.py."""

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self._problem = IN_TIME[name]
        self.net = self._problem.network()
        self._points = self._problem.draw(self._problem.count)
        self._problem.truth()

    def loss(self) -> Tensor:
        """What all methods minimise."""
        return least_squares(self._problem.residual(self.net, self._points))

    def renew(self, steps: int, every: int) -> bool:
        """Draw the points anew after every so many steps."""
        if steps % every:
            return False
        self._points = self._problem.draw_anew(self.net)
        return True

    def error(self) -> float:
        """Relative, in L²."""
        return self._problem.error(self.net)


AnyTask = Task | TaskInTime


class TimeUp(Exception):  # noqa: N818
    """The budget is spent."""


class Clock:
    """Counts CPU seconds, and notes the error now and then."""

    def __init__(self, task: AnyTask, seconds: float) -> None:
        self._task, self._seconds, self._paused = task, seconds, 0.0
        self._next = seconds / 1000
        self._start = time.process_time()
        self.curve: list[tuple[float, float]] = []

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.process_time() - self._start - self._paused

    @property
    def share(self) -> float:
        """The part of the budget that is spent."""
        return self.spent / self._seconds

    def note(self) -> None:
        """To be called after each step.

        Raises:
            TimeUp: the budget is spent.
        """
        now = self.spent
        if now >= min(self._next, self._seconds):
            began = time.process_time()
            self.curve.append((now, self._task.error()))
            self._paused += time.process_time() - began
            self._next = max(now, self._seconds / 1000) * 1000 ** (1 / CURVE_POINTS)
        if now >= self._seconds:
            raise TimeUp


def natural_cg(task: AnyTask, clock: Clock) -> None:
    """With its defaults."""
    optimizer = NaturalCG(task.net.parameters())
    for steps in count(1):
        optimizer.step(task.loss)
        clock.note()
        task.renew(steps, 5)


def lbfgs(task: AnyTask, clock: Clock) -> None:
    """With a strong-Wolfe line search and 50 pairs; it starts afresh where it gets stuck."""
    while True:
        optimizer = torch.optim.LBFGS(
            task.net.parameters(),
            history_size=50,
            max_iter=10,
            max_eval=100,
            line_search_fn="strong_wolfe",
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = task.loss()
            loss.backward()
            return loss.detach()

        before = math.inf
        for steps in count(1):
            loss = optimizer.step(closure).item()
            clock.note()
            if task.renew(10 * steps, 500):
                loss = math.inf
            elif not loss < before:
                break
            before = loss


def adam(task: AnyTask, clock: Clock) -> None:
    """With a rate that falls exponentially from 1e-2 to 1e-4 over the budget: the best of four schedules tried."""
    optimizer = torch.optim.Adam(task.net.parameters())
    for steps in count(1):
        optimizer.param_groups[0]["lr"] = 10 ** (-2 - 2 * clock.share)
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()
        clock.note()
        task.renew(steps, 500)


def pytorch_minimize(task: Task, clock: Clock) -> None:
    """Its trust-region reflective least squares, whose linear systems are solved by products (LSMR)."""
    names = [name for name, _ in task.net.named_parameters()]
    params = list(task.net.parameters())
    sizes = [p.numel() for p in params]
    factors = [
        (w / n) ** 0.5
        for w, n in ((1, task.equation.interior), (BOUNDARY_WEIGHT, task.equation.boundary))
    ]
    best = math.inf

    def residuals(flat: Tensor) -> Tensor:
        nonlocal best
        pieces = [piece.view_as(p) for piece, p in zip(flat.split(sizes), params, strict=True)]
        named = dict(zip(names, pieces, strict=True))
        with torch.enable_grad():
            parts = task.residuals(lambda x: functional_call(task.net, named, (x,)))
        result = torch.cat(
            [factor * part.reshape(-1) for factor, part in zip(factors, parts, strict=True)]
        )
        loss = result.detach().square().sum().item()
        if loss < best:
            best = loss
            with torch.no_grad():
                for p, piece in zip(params, pieces, strict=True):
                    p.copy_(piece.detach())
        clock.note()
        return result

    while True:
        start = torch.cat([p.detach().reshape(-1) for p in params])
        torchmin.least_squares(
            residuals, start, ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=100_000
        )


class Residual(nn.Module):
    """The residual as a module, for torch-levenberg-marquardt; rows of its input: point, whether on the boundary."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.net = task.net
        self._task = task
        count = task.equation.interior + task.equation.boundary
        self._factors = [
            (w * count / n) ** 0.5
            for w, n in ((1, task.equation.interior), (BOUNDARY_WEIGHT, task.equation.boundary))
        ]

    def forward(self, rows: Tensor) -> Tensor:
        x, edge = rows[:, :-1], rows[:, -1:]
        equation = self._task.equation
        inside = equation.residual(x, *second_derivatives_by_forward_mode(self.net, x)).unsqueeze(
            -1
        )
        given = self.net(x) - equation.exact(x)
        return torch.where(edge > 0, self._factors[1] * given, self._factors[0] * inside)


def torch_levenberg_marquardt(task: Task, clock: Clock) -> None:
    """With Cholesky factors and damping down to 1e-20; its other defaults."""
    import torch_levenberg_marquardt as tlm

    x = torch.cat([task.inside, task.edge])
    on_edge = torch.cat([torch.zeros(len(task.inside), 1), torch.ones(len(task.edge), 1)])
    rows, targets = torch.cat([x, on_edge], 1), torch.zeros(len(x), 1)
    module = tlm.training.LevenbergMarquardtModule(
        Residual(task),
        damping_strategy=tlm.damping.StandardDampingStrategy(min_value=1e-20),
        solve_method="cholesky",
    )
    while True:
        module.training_step(rows, targets)
        clock.note()


def ssbroyden(task: AnyTask, clock: Clock) -> None:
    """Of all parameters, dense; it starts afresh where it gets stuck."""
    params = list(task.net.parameters())

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        vector_to_parameters(x, params)
        loss = task.loss()
        return loss.item(), parameters_to_vector(torch.autograd.grad(loss, params))

    while True:
        method = SSBroyden(evaluate, parameters_to_vector(params).detach())
        for steps in count(1):
            if not method.step():
                break
            vector_to_parameters(method.x, params)
            clock.note()
            if task.renew(steps, 500):
                method.value, method.gradient = evaluate(method.x)
        vector_to_parameters(method.x, params)
        clock.note()


GENERAL: dict[str, Callable[[Any, Clock], None]] = {
    "NaturalCG": natural_cg,
    "SSBroyden": ssbroyden,
    "L-BFGS": lbfgs,
    "Adam": adam,
}
"""Those that need nothing but the loss."""

METHODS: dict[str, Callable[[Any, Clock], None]] = {
    **GENERAL,
    "pytorch-minimize": pytorch_minimize,
    "torch-levenberg-marquardt": torch_levenberg_marquardt,
}


def run(problem: str, method: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train once."""
    task = TaskInTime(problem, seed) if problem in IN_TIME else Task(problem, seed)
    clock = Clock(task, seconds)
    with suppress(TimeUp):
        METHODS[method](task, clock)
    return {
        "problem": problem,
        "method": method,
        "seed": seed,
        "seconds": seconds,
        "curve": clock.curve,
    }


def finals(runs: list[dict[str, Any]], problem: str, method: str) -> list[float]:
    """The error at the end of each run."""
    return [r["curve"][-1][1] for r in runs if (r["problem"], r["method"]) == (problem, method)]


def table(runs: list[dict[str, Any]]) -> str:
    """Errors at the end, as Markdown."""
    methods = [name for name in METHODS if any(r["method"] == name for r in runs)]
    lines = [f"| problem | seconds | {' | '.join(methods)} |", f"|---|---|{'---|' * len(methods)}"]
    for problem in EVERY:
        cells = []
        for method in methods:
            errors = finals(runs, problem, method)
            spread = f" ({min(errors):.1e} – {max(errors):.1e})" if len(errors) > 1 else ""
            cells.append(f"{geometric_mean(errors):.1e}{spread}" if errors else "–")
        if any(cell != "–" for cell in cells):
            took = {r["seconds"] for r in runs if r["problem"] == problem}
            after = " or ".join(f"{seconds:g}" for seconds in sorted(took))
            lines.append(f"| {problem} | {after} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(runs: list[dict[str, Any]]) -> Figure:
    """Error against seconds, a panel for each problem and a line for each run."""
    problems = [name for name in EVERY if any(r["problem"] == name for r in runs)]
    picture = Figure(figsize=(4 * len(problems), 3.6), layout="constrained")
    for axes, problem in zip(
        picture.subplots(1, len(problems), squeeze=False)[0], problems, strict=True
    ):
        labelled: set[str] = set()
        for r in runs:
            if r["problem"] == problem:
                label = None if r["method"] in labelled else r["method"]
                labelled.add(r["method"])
                axes.loglog(
                    *zip(*r["curve"], strict=True),
                    color=COLORS[r["method"]],
                    label=label,
                    alpha=0.8,
                )
        title = f"{problem}, relative" if problem in IN_TIME else f"{problem} parameters"
        axes.set(title=title, xlabel="CPU seconds")
        axes.grid(alpha=0.3)
    picture.axes[0].set_ylabel("RMS error")
    lines = [axes.get_legend_handles_labels() for axes in picture.axes]
    by_label = {
        label: line for pair in lines for line, label in zip(*pair, strict=True)
    }  # one of each method, wherever it has run
    picture.axes[0].legend(by_label.values(), by_label.keys(), fontsize="small")
    return picture


def write(runs: list[dict[str, Any]]) -> None:
    """Keep the runs, and show them."""
    (RESULTS / "pinn.json").write_text(json.dumps(runs) + "\n")
    text = "RMS error (of equations without a number of parameters relative, in L²) on one thread, float64"
    text += f" ({', '.join(f'{k} {v}' for k, v in machine().items())});"
    text += " geometric mean over seeds (smallest – largest):\n\n" + table(runs)
    (RESULTS / "pinn.md").write_text(text)
    figure(runs).savefig(RESULTS / "pinn.png", dpi=110)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--problems", nargs="+", choices=EVERY, default=EVERY)
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    path = RESULTS / "pinn.json"
    runs: list[dict[str, Any]] = (
        json.loads(path.read_text()) if path.exists() and not args.again else []
    )
    done = {(r["problem"], r["method"], r["seed"]) for r in runs if r["seconds"] >= args.seconds}
    for seed in range(args.seeds):
        for problem in args.problems:
            for method in args.methods:
                fits = method in GENERAL or problem in PROBLEMS
                if fits and (problem, method, seed) not in done:
                    runs.append(run(problem, method, seed, args.seconds))
                    print(
                        f"{problem}, seed {seed}: {method} {runs[-1]['curve'][-1][1]:.2e}",
                        flush=True,
                    )
                    write(runs)


if __name__ == "__main__":
    main()
