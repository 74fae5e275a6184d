"""Classic nonlinear least squares: residuals, published starts, and published sums of squares at the minimum.

``NIST``: the nonlinear regression problems of NIST's Statistical Reference Datasets. nist_strd.json has their data,
starts and certified values (https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml, a work of the U.S. government).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Classic(NamedTuple):
    """Residuals as a function of the parameters, where to start, and the sums of squares at the minima.

    ``starts`` are the published ones, from the far to the near one; the first of ``minima`` is the least.
    """

    residuals: Callable[[Tensor], Tensor]
    starts: list[list[float]]
    minima: tuple[float, ...]
    solution: list[float] | None = None
    standard_errors: list[float] | None = None

    def solved(self, found: float, nothing: float) -> bool:
        """Whether a sum of squares is that of a minimum, to the published digits."""
        return any(
            least - nothing <= found * (1 + 3e-6) and found <= least * (1 + 3e-6) + nothing
            for least in self.minima
        )


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
        (record["residual_sum_of_squares"],),
        record["certified"],
        record["standard_errors"],
    )


_RECORDS = json.loads(Path(__file__).with_name("nist_strd.json").read_text())
NIST = {name: nist_problem(name, record) for name, record in _RECORDS.items()}
