"""How many iterations a solve takes, with and without a preconditioner.

    python benchmarks/iterations.py

NaturalCG trains each model for 20 steps with its defaults. At steps 1, 5, 10 and 20 each preconditioner solves the
system of that step, from zero: how many iterations get to 95 % of the decrease that the damped quadratic model allows?
The residual's norm would tell less: plain conjugate gradients make it small early, where the gradient is large and not
where the loss can fall. Writes results/iterations.json and .md.
"""

import copy
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from models import mlp
from tasks import DIGIT, IMAGES, TASKS, small_cnn
from timing import machine
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ngd_optim import LinearSolution, NaturalCG, conjugate_gradient

RESULTS = Path(__file__).parent / "results"
PRECONDITIONERS = {"none": None, "diagonal": "diagonal", "Kronecker factors": "kfac"}
STEPS, MOST, SHARE = (1, 5, 10, 20), 1_000, 0.95
Matvec = Callable[[Tensor], Tensor]
TIGHT = {"cg_tol": 1e-4, "cg_progress_tol": 0.0, "warm_start": 0.0, "max_cg_iters": MOST}


class Problem(NamedTuple):
    """A model, its closure's function, and the settings that differ from the defaults."""

    make: Callable[[], nn.Module]
    closure: Callable[[nn.Module], Any]
    settings: Mapping[str, Any] = MappingProxyType({})


class Rows(nn.Module):
    """An LSTM that reads a digit row by row, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x.unflatten(1, (8, 8)))[0][:, -1])


class Policy(nn.Module):
    """A Gaussian policy of HalfCheetah's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = mlp(17, 64, 64, 6), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Independent:
        return Independent(Normal(self.mean(x), self.log_std.exp()), 1)


_RANDOM = torch.Generator().manual_seed(0)
STATES, ACTIONS = torch.randn(2048, 17, generator=_RANDOM), torch.randn(2048, 6, generator=_RANDOM)
ADVANTAGES = torch.tanh(ACTIONS[:, 0] * STATES[:, 0]) + torch.randn(2048, generator=_RANDOM)


def policy_gain(policy: nn.Module) -> tuple[Tensor, Independent]:
    """The surrogate loss of TRPO, its old policy the standard normal."""
    now = policy(STATES)
    ratio = (
        now.log_prob(ACTIONS) - Independent(Normal(0 * ACTIONS, 1.0), 1).log_prob(ACTIONS)
    ).exp()
    return -(ratio * ADVANTAGES).mean(), now


def classification(model: nn.Module) -> Tensor:
    """All digits."""
    return F.cross_entropy(model(IMAGES), DIGIT)


PROBLEMS = {
    "MLP 64-128-128-10": Problem(lambda: mlp(64, 128, 128, 10), classification),
    "autoencoder": Problem(*TASKS["autoencoder, tanh"][:2]),
    "CNN": Problem(small_cnn, classification),
    "LSTM": Problem(Rows, classification),
    "transformer": Problem(*TASKS["language model"][:2]),
    "TRPO policy": Problem(Policy, policy_gain, {"trust_region": "damped", "adapt_damping": False}),
}


def decreases(
    problem: Problem, model: nn.Module, optimizer: NaturalCG, preconditioner: str | None
) -> list[float]:
    """What the damped quadratic model of the next step has fallen by after each iteration of a tight solve."""
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.param_groups[0].update(TIGHT, preconditioner=preconditioner)
    found: list[float] = []

    def solve(
        matvec: Matvec, b: Tensor, *, preconditioner: Matvec | None, **settings: Any
    ) -> LinearSolution:
        """Conjugate gradients; each iteration lowers the model by ½ (rᵀz)² / pᵀA p."""
        at_residual: list[float] = []

        def observed(r: Tensor) -> Tensor:
            z = r.clone() if preconditioner is None else preconditioner(r)
            at_residual.append(torch.dot(r, z).item())
            return z

        def product(p: Tensor) -> Tensor:
            a_p = matvec(p)
            found.append(0.5 * at_residual[-1] ** 2 / torch.dot(p, a_p).item())
            return a_p

        return conjugate_gradient(product, b, preconditioner=observed, **settings)

    with patch("ngd_optim.solvers.iterative.conjugate_gradient", solve):
        optimizer.step(lambda: problem.closure(model))
    return list(accumulate(found))


def iterations(problem: Problem) -> dict[str, list[int]]:
    """Of each preconditioner, before the steps that are looked at."""
    torch.manual_seed(0)
    model = problem.make()
    optimizer = NaturalCG(model.parameters(), **problem.settings)
    found: dict[str, list[int]] = {name: [] for name in PRECONDITIONERS}
    for step in range(1, max(STEPS) + 1):
        if step in STEPS:
            curves = {
                name: decreases(problem, model, optimizer, kind)
                for name, kind in PRECONDITIONERS.items()
            }
            goal = SHARE * max(curve[-1] for curve in curves.values())
            for name, curve in curves.items():
                found[name].append(1 + bisect_left(curve, goal))
        optimizer.step(lambda: problem.closure(model))
    return found


def table(results: dict[str, dict[str, list[int]]]) -> str:
    """Markdown: a model per row."""
    lines = [
        f"| iterations at steps {', '.join(map(str, STEPS))} | {' | '.join(PRECONDITIONERS)} | times fewer |"
    ]
    lines.append(f"|---|{'---|' * len(PRECONDITIONERS)}---|")
    for name, found in results.items():
        cells = [
            ", ".join(f"> {MOST:,}" if n > MOST else str(n) for n in counts)
            for counts in found.values()
        ]
        fewer = mean(found["none"]) / mean(found["Kronecker factors"])
        lines.append(f"| {name} | {' | '.join(cells)} | {fewer:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Solve, print and write."""
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[int]]] = {}
    for name, problem in PROBLEMS.items():
        results[name] = iterations(problem)
        print(name, results[name], flush=True)
    (RESULTS / "iterations.json").write_text(
        json.dumps({"machine": machine(), "iterations": results}) + "\n"
    )
    (RESULTS / "iterations.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
