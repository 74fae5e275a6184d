"""Classic nonlinear least squares: residuals, published starts, and published sums of squares at the minimum.

``NIST``: the nonlinear regression problems of NIST's Statistical Reference Datasets. nist_strd.json has their data,
starts and certified values (https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml, a work of the U.S. government).
``MGH``: Moré, Garbow & Hillstrom, Testing unconstrained optimization software, ACM TOMS 7 (1981).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Classic(NamedTuple):
    """Residuals as a function of the parameters, where to start, and the least sum of squares.

    ``starts`` are the published ones, from the far to the near one.
    """

    residuals: Callable[[Tensor], Tensor]
    starts: list[list[float]]
    sum_of_squares: float
    solution: list[float] | None = None
    standard_errors: list[float] | None = None


def vector(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cubic_over_cubic(b: Tensor, x: Tensor) -> Tensor:
    return (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def two_peaks(b: Tensor, x: Tensor) -> Tensor:
    peaks = b[2] * torch.exp(-(((x - b[3]) / b[4]) ** 2)) + b[5] * torch.exp(
        -(((x - b[6]) / b[7]) ** 2)
    )
    return b[0] * torch.exp(-b[1] * x) + peaks


def three_decays(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * torch.exp(-b[1] * x) + b[2] * torch.exp(-b[3] * x) + b[4] * torch.exp(-b[5] * x)


def oscillation(b: Tensor, x: Tensor) -> Tensor:
    total = b[0]
    for a, c, period in ((b[1], b[2], 12.0), (b[4], b[5], b[3]), (b[7], b[8], b[6])):
        phase = 2 * math.pi * x / period
        total = total + a * torch.cos(phase) + c * torch.sin(phase)
    return total


def rosenbrock(x: Tensor) -> Tensor:
    """Not as residuals but as one number: the valley along ``x[1] = x[0]²`` with its floor at 1."""
    return (1 - x[:-1]).square().sum() + 100 * (x[1:] - x[:-1].square()).square().sum()


MODELS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
    "Chwirut1": lambda b, x: torch.exp(-b[0] * x) / (b[1] + b[2] * x),
    "Chwirut2": lambda b, x: torch.exp(-b[0] * x) / (b[1] + b[2] * x),
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": oscillation,
    "Eckerle4": lambda b, x: b[0] / b[1] * torch.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": two_peaks,
    "Gauss2": two_peaks,
    "Gauss3": two_peaks,
    "Hahn1": cubic_over_cubic,
    "Kirby2": lambda b, x: (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4])),
    "Lanczos1": three_decays,
    "Lanczos2": three_decays,
    "Lanczos3": three_decays,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * torch.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * torch.exp(-x * b[3]) + b[2] * torch.exp(-x * b[4]),
    "Misra1a": lambda b, x: b[0] * (1 - torch.exp(-b[1] * x)),
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[0] * torch.exp(-b[2] * x[1]),
    "Rat42": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - torch.arctan(b[2] / (x - b[3])) / math.pi,
    "Thurber": cubic_over_cubic,
}


def nist_problem(name: str, record: dict[str, Any]) -> Classic:
    y, *x = vector(record["data"]).T
    y, x = (y.log(), x) if name == "Nelson" else (y, x[0])
    model = MODELS[name]
    return Classic(
        lambda b: model(b, x) - y,
        record["starts"],
        record["residual_sum_of_squares"],
        record["certified"],
        record["standard_errors"],
    )


_RECORDS = json.loads(Path(__file__).with_name("nist_strd.json").read_text())
NIST = {name: nist_problem(name, record) for name, record in _RECORDS.items()}


def numbers(text: str) -> Tensor:
    return vector([float(word) for word in text.split()])


_KOWALIK_Y = numbers("0.1957 0.1947 0.1735 0.1600 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246")
_KOWALIK_U = numbers("4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625")
_BARD_Y = numbers("0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.10 4.39")
_MEYER_Y = numbers(
    "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872"
)
_OSBORNE1_Y = numbers("""
    0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.850 0.818 0.784 0.751 0.718 0.685 0.658 0.628 0.603 0.580
    0.558 0.538 0.522 0.506 0.490 0.478 0.467 0.457 0.448 0.438 0.431 0.424 0.420 0.414 0.411 0.406
""")
_OSBORNE2_Y = numbers("""
    1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679 0.608 0.655 0.616 0.606 0.602
    0.626 0.651 0.724 0.649 0.649 0.694 0.644 0.624 0.661 0.612 0.558 0.533 0.495 0.500 0.423 0.395 0.375
    0.372 0.391 0.396 0.405 0.428 0.429 0.523 0.562 0.607 0.653 0.672 0.708 0.633 0.668 0.645 0.632 0.591
    0.559 0.597 0.625 0.739 0.710 0.729 0.720 0.636 0.581 0.428 0.292 0.162 0.098 0.054
""")


def wood(x: Tensor) -> Tensor:
    parts = [10 * (x[1] - x[0] ** 2), 1 - x[0], 90**0.5 * (x[3] - x[2] ** 2), 1 - x[2]]
    return torch.stack([*parts, 10**0.5 * (x[1] + x[3] - 2), 10**-0.5 * (x[1] - x[3])])


def powell_singular(x: Tensor) -> Tensor:
    parts = [
        x[0] + 10 * x[1],
        5**0.5 * (x[2] - x[3]),
        (x[1] - 2 * x[2]) ** 2,
        10**0.5 * (x[0] - x[3]) ** 2,
    ]
    return torch.stack(parts)


def brown_dennis(x: Tensor) -> Tensor:
    t = torch.arange(1, 21, dtype=torch.float64) / 5
    return (x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2


def bard(x: Tensor) -> Tensor:
    u = torch.arange(1, 16, dtype=torch.float64)
    v = 16 - u
    return _BARD_Y - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def kowalik_osborne(x: Tensor) -> Tensor:
    u = _KOWALIK_U
    return _KOWALIK_Y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def osborne_1(x: Tensor) -> Tensor:
    t = 10 * torch.arange(33, dtype=torch.float64)
    return _OSBORNE1_Y - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def osborne_2(x: Tensor) -> Tensor:
    t = torch.arange(65, dtype=torch.float64) / 10
    peaks = [x[k] * torch.exp(-((t - x[k + 7]) ** 2) * x[k + 4]) for k in (1, 2, 3)]
    return _OSBORNE2_Y - (x[0] * torch.exp(-t * x[4]) + sum(peaks))


MGH = {
    "Rosenbrock": Classic(
        lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]), [[-1.2, 1.0]], 0.0, [1.0, 1.0]
    ),
    "Powell singular": Classic(powell_singular, [[3.0, -1.0, 0.0, 1.0]], 0.0),
    "Wood": Classic(wood, [[-3.0, -1.0, -3.0, -1.0]], 0.0, [1.0] * 4),
    "Beale": Classic(
        lambda x: torch.stack(
            [c - x[0] * (1 - x[1] ** k) for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))]
        ),
        [[1.0, 1.0]],
        0.0,
        [3.0, 0.5],
    ),
    "Brown-Dennis": Classic(brown_dennis, [[25.0, 5.0, -5.0, -1.0]], 85822.2),
    "Bard": Classic(bard, [[1.0, 1.0, 1.0]], 8.21487e-3),
    "Kowalik-Osborne": Classic(kowalik_osborne, [[0.25, 0.39, 0.415, 0.39]], 3.07505e-4),
    "Meyer": Classic(
        lambda x: (
            x[0] * torch.exp(x[1] / (50 + 5 * torch.arange(16, dtype=torch.float64) + x[2]))
            - _MEYER_Y
        ),
        [[0.02, 4000.0, 250.0]],
        87.9458,
    ),
    "Osborne 1": Classic(osborne_1, [[0.5, 1.5, -1.0, 0.01, 0.02]], 5.46489e-5),
    "Osborne 2": Classic(
        osborne_2, [[1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5]], 4.01377e-2
    ),
}
