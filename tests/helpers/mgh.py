"""Moré, Garbow & Hillstrom, Testing unconstrained optimization software, TOMS 7 (1981): all 35 functions as residuals.

Numbers in comments are those of the paper. Functions of any number of variables come in several sizes.
"""

from typing import Any

import torch
from torch import Tensor

from helpers.classics import Classic, vector


def numbers(text: str) -> Tensor:
    return vector([float(word) for word in text.split()])


def count(n: int, first: int = 1) -> Tensor:
    return torch.arange(first, first + n, dtype=torch.float64, device="cpu")


_KOWALIK_Y = numbers("0.1957 0.1947 0.1735 0.1600 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246")
_KOWALIK_U = numbers("4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625")
_BARD_Y = numbers("0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.10 4.39")
_GAUSSIAN_Y = numbers(
    "0.0009 0.0044 0.0175 0.0540 0.1295 0.2420 0.3521 0.3989 0.3521 0.2420 0.1295 0.0540 0.0175 0.0044 0.0009"
)
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


def rosenbrock(x: Tensor) -> Tensor:  # 1 and 21
    return torch.cat([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]])


def freudenstein_roth(x: Tensor) -> Tensor:  # 2
    a, b = x
    return torch.stack([a - 13 + ((5 - b) * b - 2) * b, a - 29 + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: Tensor) -> Tensor:  # 3
    return torch.stack([1e4 * x[0] * x[1] - 1, (-x[0]).exp() + (-x[1]).exp() - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:  # 4
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: Tensor) -> Tensor:  # 5
    return torch.stack([c - x[0] * (1 - x[1] ** k) for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))])


def jennrich_sampson(x: Tensor) -> Tensor:  # 6
    i = count(10)
    return 2 + 2 * i - ((i * x[0]).exp() + (i * x[1]).exp())


def helical_valley(x: Tensor) -> Tensor:  # 7
    turn = torch.atan2(x[1], x[0]) / (2 * torch.pi)
    turn = torch.where(turn < -0.25, turn + 1, turn)  # the paper's θ lies in (-1/4, 3/4)
    return torch.stack([10 * (x[2] - 10 * turn), 10 * (torch.hypot(x[0], x[1]) - 1), x[2]])


def bard(x: Tensor) -> Tensor:  # 8
    u = count(15)
    v = 16 - u
    return _BARD_Y - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def gaussian(x: Tensor) -> Tensor:  # 9
    t = (8 - count(15)) / 2
    return x[0] * (-x[1] * (t - x[2]) ** 2 / 2).exp() - _GAUSSIAN_Y


def meyer(x: Tensor) -> Tensor:  # 10
    return x[0] * torch.exp(x[1] / (45 + 5 * count(16) + x[2])) - _MEYER_Y


def gulf(x: Tensor) -> Tensor:  # 11
    t = count(99) / 100
    y = 25 + (-50 * t.log()) ** (2 / 3)
    return (-((y - x[1]).abs() ** x[2]) / x[0]).exp() - t


def box(x: Tensor) -> Tensor:  # 12
    t = count(10) / 10
    return (-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())


def powell_singular(x: Tensor) -> Tensor:  # 13 and 22
    a, b, c, d = x[::4], x[1::4], x[2::4], x[3::4]
    return torch.cat([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


def wood(x: Tensor) -> Tensor:  # 14
    parts = [10 * (x[1] - x[0] ** 2), 1 - x[0], 90**0.5 * (x[3] - x[2] ** 2), 1 - x[2]]
    return torch.stack([*parts, 10**0.5 * (x[1] + x[3] - 2), 10**-0.5 * (x[1] - x[3])])


def kowalik_osborne(x: Tensor) -> Tensor:  # 15
    u = _KOWALIK_U
    return _KOWALIK_Y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Tensor) -> Tensor:  # 16
    t = count(20) / 5
    return (x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2


def osborne_1(x: Tensor) -> Tensor:  # 17
    t = 10 * count(33, 0)
    return _OSBORNE1_Y - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def biggs(x: Tensor) -> Tensor:  # 18
    t = count(13) / 10
    y = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return x[2] * (-t * x[0]).exp() - x[3] * (-t * x[1]).exp() + x[5] * (-t * x[4]).exp() - y


def osborne_2(x: Tensor) -> Tensor:  # 19
    t = count(65, 0) / 10
    peaks = [x[k] * torch.exp(-((t - x[k + 7]) ** 2) * x[k + 4]) for k in (1, 2, 3)]
    return _OSBORNE2_Y - (x[0] * torch.exp(-t * x[4]) + sum(peaks))


def watson(x: Tensor) -> Tensor:  # 20
    t, j = count(29)[:, None] / 29, count(len(x), 0)
    value = (x * t**j).sum(1)
    slope = (j[1:] * x[1:] * t ** (j[1:] - 1)).sum(1)
    return torch.cat([slope - value**2 - 1, x[:1], (x[1] - x[0] ** 2 - 1)[None]])


def penalty_1(x: Tensor) -> Tensor:  # 23
    return torch.cat([1e-5**0.5 * (x - 1), (x.square().sum() - 0.25)[None]])


def penalty_2(x: Tensor) -> Tensor:  # 24
    n, a = len(x), 1e-5**0.5
    i = count(n)
    y = (i[1:] / 10).exp() + ((i[1:] - 1) / 10).exp()
    chain = a * ((x[1:] / 10).exp() + (x[:-1] / 10).exp() - y)
    single = a * ((x[1:] / 10).exp() - torch.full_like(x[1:], -0.1).exp())
    total = ((n - i + 1) * x.square()).sum() - 1
    return torch.cat([(x[0] - 0.2)[None], chain, single, total[None]])


def variably_dimensioned(x: Tensor) -> Tensor:  # 25
    total = (count(len(x)) * (x - 1)).sum()
    return torch.cat([x - 1, total[None], total.square()[None]])


def trigonometric(x: Tensor) -> Tensor:  # 26
    n = len(x)
    return n - x.cos().sum() + count(n) * (1 - x.cos()) - x.sin()


def brown_almost_linear(x: Tensor) -> Tensor:  # 27
    n = len(x)
    return torch.cat([x[:-1] + x.sum() - (n + 1), (x.prod() - 1)[None]])


def discrete_boundary_value(x: Tensor) -> Tensor:  # 28
    n = len(x)
    h, zero = 1 / (n + 1), x.new_zeros(1)
    left, right = torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])
    return 2 * x - left - right + h**2 * (x + h * count(n) + 1) ** 3 / 2


def discrete_integral(x: Tensor) -> Tensor:  # 29
    n = len(x)
    h = 1 / (n + 1)
    t = h * count(n)
    cubes = (x + t + 1) ** 3
    kernel = torch.minimum(t[:, None], t) * (1 - torch.maximum(t[:, None], t))
    return x + h / 2 * kernel @ cubes


def broyden_tridiagonal(x: Tensor) -> Tensor:  # 30
    zero = x.new_zeros(1)
    left, right = torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])
    return (3 - 2 * x) * x - left - 2 * right + 1


def broyden_banded(x: Tensor) -> Tensor:  # 31
    i = count(len(x))
    gap = i - i[:, None]
    band = ((gap >= -5) & (gap <= 1) & (gap != 0)).double()
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


def linear_full_rank(x: Tensor) -> Tensor:  # 32, with m = 2 n
    m = 2 * len(x)
    mean = 2 * x.sum() / m + 1
    return torch.cat([x, x.new_zeros(m - len(x))]) - mean


def linear_rank_1(x: Tensor) -> Tensor:  # 33, with m = 2 n
    return count(2 * len(x)) * (count(len(x)) * x).sum() - 1


def linear_rank_1_zeros(x: Tensor) -> Tensor:  # 34, with m = 2 n
    n = len(x)
    inner = count(2 * n - 2) * (count(n)[1:-1] * x[1:-1]).sum() - 1
    return torch.cat([x.new_full((1,), -1.0), inner, x.new_full((1,), -1.0)])


def chebyquad(x: Tensor) -> Tensor:  # 35
    before, now = torch.ones_like(x), 2 * x - 1
    means = []
    for i in range(1, len(x) + 1):
        integral = -1 / (i * i - 1) if i % 2 == 0 else 0.0
        means.append(now.mean() - integral)
        before, now = now, 2 * (2 * x - 1) * now - before
    return torch.stack(means)


def _boundary_start(n: int) -> list[float]:
    t = count(n) / (n + 1)
    return (t * (t - 1)).tolist()


def _rank_1(m: int) -> float:
    return m * (m - 1) / (2 * (2 * m + 1))


def _rank_1_zeros(m: int) -> float:
    return (m**2 + 3 * m - 6) / (2 * (2 * m - 3))


_ROWS: list[tuple[str, Any, list[float], tuple[float, ...]]] = [
    ("Rosenbrock", rosenbrock, [-1.2, 1.0], (0.0,)),
    ("Freudenstein-Roth", freudenstein_roth, [0.5, -2.0], (0.0, 48.98426)),
    ("Powell badly scaled", powell_badly_scaled, [0.0, 1.0], (0.0,)),
    ("Brown badly scaled", brown_badly_scaled, [1.0, 1.0], (0.0,)),
    ("Beale", beale, [1.0, 1.0], (0.0,)),
    ("Jennrich-Sampson", jennrich_sampson, [0.3, 0.4], (124.3622,)),
    ("Helical valley", helical_valley, [-1.0, 0.0, 0.0], (0.0,)),
    ("Bard", bard, [1.0, 1.0, 1.0], (8.214878e-3, 17.42870)),
    ("Gaussian", gaussian, [0.4, 1.0, 0.0], (1.127933e-8,)),
    ("Meyer", meyer, [0.02, 4000.0, 250.0], (87.94586,)),
    ("Gulf", gulf, [5.0, 2.5, 0.15], (0.0,)),
    ("Box", box, [0.0, 10.0, 20.0], (0.0,)),
    ("Powell singular", powell_singular, [3.0, -1.0, 0.0, 1.0], (0.0,)),
    ("Wood", wood, [-3.0, -1.0, -3.0, -1.0], (0.0,)),
    ("Kowalik-Osborne", kowalik_osborne, [0.25, 0.39, 0.415, 0.39], (3.075057e-4, 1.027346e-3)),
    ("Brown-Dennis", brown_dennis, [25.0, 5.0, -5.0, -1.0], (85822.21,)),
    ("Osborne 1", osborne_1, [0.5, 1.5, -1.0, 0.01, 0.02], (5.464895e-5,)),
    ("Biggs", biggs, [1.0, 2.0, 1.0, 1.0, 1.0, 1.0], (0.0, 5.655650e-3)),
    (
        "Osborne 2",
        osborne_2,
        [1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5],
        (4.013775e-2,),
    ),
    ("Watson 6", watson, [0.0] * 6, (2.287670e-3,)),
    ("Watson 9", watson, [0.0] * 9, (1.399762e-6,)),
    ("Watson 12", watson, [0.0] * 12, (4.722382e-10,)),
    ("Extended Rosenbrock", rosenbrock, [-1.2, 1.0] * 5, (0.0,)),
    ("Extended Powell singular", powell_singular, [3.0, -1.0, 0.0, 1.0] * 3, (0.0,)),
    ("Penalty I 4", penalty_1, count(4).tolist(), (2.249978e-5,)),
    ("Penalty I 10", penalty_1, count(10).tolist(), (7.087652e-5,)),
    ("Penalty II 4", penalty_2, [0.5] * 4, (9.376294e-6,)),
    ("Penalty II 10", penalty_2, [0.5] * 10, (2.936606e-4,)),
    ("Variably dimensioned", variably_dimensioned, (1 - count(10) / 10).tolist(), (0.0,)),
    ("Trigonometric", trigonometric, [0.1] * 10, (0.0, 2.795062e-5)),
    ("Brown almost linear 10", brown_almost_linear, [0.5] * 10, (0.0, 1.0)),
    ("Brown almost linear 30", brown_almost_linear, [0.5] * 30, (0.0, 1.0)),
    ("Discrete boundary value", discrete_boundary_value, _boundary_start(10), (0.0,)),
    ("Discrete integral", discrete_integral, _boundary_start(10), (0.0,)),
    ("Broyden tridiagonal", broyden_tridiagonal, [-1.0] * 10, (0.0,)),
    ("Broyden banded", broyden_banded, [-1.0] * 10, (0.0,)),
    ("Linear full rank", linear_full_rank, [1.0] * 10, (10.0,)),
    ("Linear rank 1", linear_rank_1, [1.0] * 10, (_rank_1(20),)),
    ("Linear rank 1, zeros", linear_rank_1_zeros, [1.0] * 10, (_rank_1_zeros(20),)),
    ("Chebyquad 5", chebyquad, (count(5) / 6).tolist(), (0.0,)),
    ("Chebyquad 7", chebyquad, (count(7) / 8).tolist(), (0.0,)),
    ("Chebyquad 8", chebyquad, (count(8) / 9).tolist(), (3.516874e-3,)),
    ("Chebyquad 10", chebyquad, (count(10) / 11).tolist(), (6.503955e-3, 4.772714e-3)),
]

MGH = {name: Classic(residuals, [start], minima) for name, residuals, start, minima in _ROWS}
