"""Functions with saddles, valleys and several minima, each with a start: 43 sums of squares and 18 others."""

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.classics import vector
from helpers.mgh import MGH, count

Landscape = tuple[Callable[[Tensor], Tensor], list[float]]


def himmelblau(x: Tensor) -> Tensor:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def three_hump_camel(x: Tensor) -> Tensor:
    return 2 * x[0] ** 2 - 1.05 * x[0] ** 4 + x[0] ** 6 / 6 + x[0] * x[1] + x[1] ** 2


def six_hump_camel(x: Tensor) -> Tensor:
    a, b = x
    return (4 - 2.1 * a**2 + a**4 / 3) * a**2 + a * b + (4 * b**2 - 4) * b**2


def goldstein_price(x: Tensor) -> Tensor:
    a, b = x
    one = 1 + (a + b + 1) ** 2 * (19 - 14 * a + 3 * a**2 - 14 * b + 6 * a * b + 3 * b**2)
    two = 30 + (2 * a - 3 * b) ** 2 * (18 - 32 * a + 12 * a**2 + 48 * b - 36 * a * b + 27 * b**2)
    return one * two


def branin(x: Tensor) -> Tensor:
    valley = x[1] - 5.1 / (4 * torch.pi**2) * x[0] ** 2 + 5 / torch.pi * x[0] - 6
    return valley**2 + 10 * (1 - 1 / (8 * torch.pi)) * x[0].cos() + 10


def mccormick(x: Tensor) -> Tensor:
    return (x[0] + x[1]).sin() + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1


def styblinski_tang(x: Tensor) -> Tensor:
    return (x**4 - 16 * x**2 + 5 * x).sum() / 2


def dixon_price(x: Tensor) -> Tensor:
    return (x[0] - 1) ** 2 + (count(len(x))[1:] * (2 * x[1:] ** 2 - x[:-1]) ** 2).sum()


def zakharov(x: Tensor) -> Tensor:
    total = (count(len(x)) * x).sum() / 2
    return x.square().sum() + total**2 + total**4


def levy(x: Tensor) -> Tensor:
    w, pi = 1 + (x - 1) / 4, torch.pi
    inner = ((w[:-1] - 1) ** 2 * (1 + 10 * (pi * w[:-1] + 1).sin() ** 2)).sum()
    return (pi * w[0]).sin() ** 2 + inner + (w[-1] - 1) ** 2 * (1 + (2 * pi * w[-1]).sin() ** 2)


def cube(x: Tensor) -> Tensor:
    return (x[0] - 1) ** 2 + 100 * (x[1:] - x[:-1] ** 3).square().sum()


def chained_rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[:-1]).square().sum() + 100 * (x[1:] - x[:-1].square()).square().sum()


def engval(x: Tensor) -> Tensor:
    return ((x[:-1] ** 2 + x[1:] ** 2) ** 2).sum() + (3 - 4 * x[:-1]).sum()


def deep_product(x: Tensor) -> Tensor:
    return (x.prod() - 1) ** 2 + 1e-2 * (x[1:] ** 2 - x[:-1] ** 2).square().sum()


def factorisation(x: Tensor) -> Tensor:
    """Of a matrix of rank three, from near the saddle at zero."""
    U, V = x.view(2, 5, 3)
    wanted = (count(5)[:, None] * count(5)).cos() + 2 * torch.eye(5, dtype=torch.float64)
    return (U @ V.T - wanted).square().sum()


def double_wells(x: Tensor) -> Tensor:
    return ((x**2 - 1) ** 2).sum() + 0.1 * (x[1:] - x[:-1]).square().sum()


def lennard_jones(x: Tensor) -> Tensor:
    atoms = x.view(-1, 3)
    i, j = torch.triu_indices(len(atoms), len(atoms), offset=1, device="cpu")
    inverse = (atoms[i] - atoms[j]).square().sum(1) ** -3
    return 4 * (inverse**2 - inverse).sum()


def neural_cubes(x: Tensor) -> Tensor:
    """A network 1-3-1 by the cubes of its errors."""
    t = torch.linspace(-1, 1, 20, dtype=torch.float64, device="cpu")
    hidden = (t[:, None] * x[:3] + x[3:6]).tanh()
    return ((hidden @ x[6:9] + x[9] - (3 * t).sin()).abs() ** 3).mean() + 1e-4 * x.square().sum()


def _wave(n: int, size: float) -> list[float]:
    return (size * (3 * count(n)).sin()).tolist()


OTHERS: dict[str, Landscape] = {
    "Himmelblau": (himmelblau, [0.0, 0.0]),
    "Three-hump camel": (three_hump_camel, [1.1, 0.5]),
    "Six-hump camel": (six_hump_camel, [0.01, -0.02]),
    "Goldstein-Price": (goldstein_price, [0.5, 1.0]),
    "Branin": (branin, [6.0, 14.0]),
    "McCormick": (mccormick, [2.0, 2.5]),
    "Styblinski-Tang": (styblinski_tang, _wave(5, 0.5)),
    "Dixon-Price": (dixon_price, [1.0] * 10),
    "Zakharov": (zakharov, [1.0] * 10),
    "Levy": (levy, [-3.0, 4.0, 2.0, -1.0, 3.0]),
    "Cube": (cube, [-1.2, 1.0]),
    "Chained Rosenbrock": (chained_rosenbrock, [-1.2, 1.0] * 5),
    "Engval": (engval, [2.0] * 10),
    "Deep product": (deep_product, _wave(6, 0.1)),
    "Factorisation": (factorisation, _wave(30, 1e-3)),
    "Double wells": (double_wells, _wave(10, 1e-2)),
    "Lennard-Jones": (
        lennard_jones,
        (1.5 * vector([0, 0, 0, 1, 0, 0, 0, 1, 0, 0.2, 0.1, 1])).tolist(),
    ),
    "Cubes of a network": (neural_cubes, _wave(10, 1.0)),
}

LANDSCAPES: dict[str, Landscape] = {
    name: (lambda x, r=problem.residuals: r(x).square().sum(), problem.starts[0])
    for name, problem in MGH.items()
} | OTHERS


def is_minimum(name: str, x: Tensor) -> bool:
    """Whether a landscape has a minimum there: a published one, or else by its gradient and Hessian."""
    function = LANDSCAPES[name][0]
    value = function(x).item()
    if name in MGH:
        return value <= min(MGH[name].minima) or MGH[name].solved(value, 1e-8)
    lowest, *_, highest = torch.linalg.eigvalsh(torch.func.hessian(function)(x)).tolist()
    flat = torch.func.grad(function)(x).abs().max() <= 1e-5 * (1 + abs(value))
    return bool(flat) and lowest >= -1e-4 * abs(highest)
