"""Nonlinear regression with standard errors: the mobility of electrons in silicon.

Data, start and certified answer are NIST's (Thurber, Statistical Reference Datasets, "higher level of difficulty"): a
cubic over a cubic with seven parameters of very different sizes. Residuals with equal Gaussian errors of unknown size σ
make ``JᵀJ/σ²`` the Fisher information, and the roots of its inverse's diagonal are the standard errors.

Run it:

    python examples/curve_fitting.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ngd_optim import Covariance, NaturalCG, estimate_covariance, least_squares

MOBILITY = """
    80.574 84.248 87.264 87.195 89.076 89.608 89.868 90.101 92.405 95.854 100.696 101.060 401.672 390.724
    567.534 635.316 733.054 759.087 894.206 990.785 1090.109 1080.914 1122.643 1178.351 1260.531 1273.514
    1288.339 1327.543 1353.863 1414.509 1425.208 1421.384 1442.962 1464.350 1468.705 1447.894 1457.628
"""
LOG_DENSITY = """
    -3.067 -2.981 -2.921 -2.912 -2.840 -2.797 -2.702 -2.699 -2.633 -2.481 -2.363 -2.322 -1.501 -1.460 -1.274
    -1.212 -1.100 -1.046 -0.915 -0.714 -0.566 -0.545 -0.400 -0.309 -0.109 -0.103 0.010 0.119 0.377 0.790 0.963
    1.006 1.115 1.572 1.841 2.047 2.200
"""
START = [1000.0, 1000.0, 400.0, 40.0, 0.7, 0.3, 0.03]
CERTIFIED = [
    1288.1396800,
    1491.0792535,
    583.23836877,
    75.416644291,
    0.96629502864,
    0.39797285797,
    0.049727297349,
]
CERTIFIED_ERRORS = [
    4.6647963344,
    39.571156086,
    28.698696102,
    5.5675370270,
    0.031333340687,
    0.014984928198,
    0.0065842344623,
]


def numbers(text: str) -> Tensor:
    """The numbers in a text, float64."""
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def model(b: Tensor, x: Tensor) -> Tensor:
    """Cubic over cubic."""
    return (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print the parameters, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path, default=Path("figures/curve_fitting.png"))
    args = parser.parse_args(arguments)
    x, y = numbers(LOG_DENSITY), numbers(MOBILITY)
    b = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = NaturalCG([b], ftol=1e-12)

    def closure() -> Tensor:
        return least_squares(model(b, x) - y)

    steps = 0
    while not optimizer.converged:
        optimizer.step(closure)
        steps += 1

    found = estimate_covariance(closure, [b])
    errors = found.standard_errors
    print(
        f"{steps} steps, residual standard deviation {found.variance.sqrt():.6g} (NIST: 13.714600)\n"
    )
    print("     parameter ± standard error          NIST's")
    for i, (value, error) in enumerate(zip(b.tolist(), errors.tolist(), strict=True)):
        print(
            f"b{i + 1}  {value:12.7g} ± {error:<12.6g}  {CERTIFIED[i]:14.8g} ± {CERTIFIED_ERRORS[i]:.6g}"
        )
    draw(b.detach(), found, x, y, args.figure)
    print(args.figure)


def draw(b: Tensor, found: Covariance, x: Tensor, y: Tensor, path: Path) -> None:
    """Data and fit; residuals with the band of two standard errors; correlations of the parameters."""
    line = torch.linspace(x.min().item() - 0.1, x.max().item() + 0.1, 400, dtype=torch.float64)
    J = torch.func.jacrev(model)(b, line)
    band = 2 * torch.einsum("ij,jk,ik->i", J, found.matrix, J).sqrt()
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(x, y, "o", markersize=4, color="tab:orange", label="data")
    left.plot(line, model(b, line), color="tab:blue", label="fit")
    left.plot(
        line,
        model(torch.tensor(START, dtype=torch.float64), line),
        ":",
        color="gray",
        label="start",
    )
    left.set(xlabel="log₁₀ electron density", ylabel="mobility", title="electrons in silicon")
    left.legend(frameon=False)
    middle.fill_between(
        line, -band, band, color="tab:blue", alpha=0.2, label="fit ± 2 standard errors"
    )
    middle.plot(x, y - model(b, x), "o", markersize=4, color="tab:orange", label="residuals")
    middle.set(xlabel="log₁₀ electron density", title="what is left")
    middle.set_ylim(-50, 70)
    middle.legend(frameon=False)
    image = right.imshow(found.correlation, vmin=-1, vmax=1, cmap="RdBu_r")
    names = [f"b{i + 1}" for i in range(len(b))]
    right.set(title="correlation of the parameters")
    right.set_xticks(range(len(b)), names)
    right.set_yticks(range(len(b)), names)
    figure.colorbar(image, ax=right)
    for axes in (left, middle):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
