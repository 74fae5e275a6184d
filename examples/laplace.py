"""A Laplace approximation tells a classifier how sure it may be.

A small network is trained on 600 of scikit-learn's handwritten digits, under noise, until it is right about all of
them; then it is much too sure about others. There are two ways out. Both take the curvature F, summed over the data, as
Kronecker factors:

- the posterior of the weights is about a normal distribution with the precision F + δI (Ritter, Botev & Barber 2018);
  the linearised network is drawn from it (Immer, Korzepa & Bauer 2021). 200 digits are held out to choose δ by;
- the network is trained anew with a weight decay δ, that of the largest evidence, which log det(F + δI) tells (MacKay
  1992; Immer, Bauer, Fortuin, Rätsch & Khan 2021). No digits are held out.

Run it:

    python examples/laplace.py
    python examples/laplace.py --train 300 --noise 0.4 --eigenvalues

It prints the negative log-likelihood and the calibration error on digits that were not seen, and draws how often
predictions are right against how sure they are.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ngd_optim import NaturalCG
from ngd_optim.factors import KroneckerCurvature, kronecker_factors

BATCH, BINS, DRAWS = 100, 10, 300

Data = tuple[Tensor, Tensor]
HELD_OUT = 200
PRECISIONS = (1.0, 3.0, 10.0, 30.0, 100.0)
COLORS = ("tab:orange", "tab:blue", "tab:green")


def load(count: int, noise: float, seed: int) -> tuple[Data, Data, Data]:
    """Images and labels to train on, to choose by, and all others."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.as_tensor(images)[order] / 16, torch.as_tensor(labels)[order]
    x = x + noise * torch.randn(x.shape, generator=generator)
    last = count + HELD_OUT
    return (x[:count], y[:count]), (x[count:last], y[count:last]), (x[last:], y[last:])


def train(model: nn.Module, data: Data, decay: float) -> None:
    """To the mode of the posterior, where the prior's precision is the decay times the number of samples."""
    x, y = data
    optimizer = NaturalCG(model.parameters(), weight_decay=decay)
    for _ in range(30):
        optimizer.step(lambda: F.cross_entropy(model(x), y))


def curvature(model: nn.Module, data: Data, *, eigenvalues: bool) -> KroneckerCurvature:
    """F, the sum over all samples; one batch is in memory at a time."""

    class Loader:
        def __iter__(self) -> Iterator[tuple[object, int]]:
            for inputs, labels in zip(*(part.split(BATCH) for part in data), strict=True):
                yield (lambda a=inputs, b=labels: F.cross_entropy(model(a), b)), len(inputs)

    mean = kronecker_factors(Loader(), model.named_parameters(), eigenvalues=eigenvalues)
    return mean.scale(len(data[0]))


def choose_by_evidence(curvature: KroneckerCurvature, theta: Tensor) -> float:
    """The ``δ`` of the largest evidence: where ``½ n log δ − ½ log det(F + δI) − ½ δ‖θ‖²`` is."""
    log_precision = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_precision], lr=0.5, max_iter=100, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        precision = log_precision.exp()
        evidence = len(theta) * log_precision - curvature.logdet(precision)
        loss = -0.5 * (evidence - precision * theta.square().sum())
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return log_precision.exp().item()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, curvature: KroneckerCurvature, precision: float) -> Tensor:
    """Class probabilities, (samples, classes): the mean over draws from the posterior of the linearised network."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    rows = vmap(jacrev(lambda p, a: functional_call(model, p, (a,))), in_dims=(None, 0))
    noise = torch.randn(curvature.shape[0], DRAWS, generator=torch.Generator().manual_seed(0))
    moves = curvature.inverse_root(noise, precision)  # of the weights, covariance (F + δI)⁻¹
    probabilities: list[Tensor] = []
    for part in x.split(BATCH):
        J = torch.cat([j.flatten(2) for j in rows(params, part).values()], 2)
        logits = model(part).unsqueeze(2) + J @ moves
        probabilities.append(logits.softmax(1).mean(2))
    return torch.cat(probabilities)


def reliability(probabilities: Tensor, labels: Tensor) -> list[tuple[float, float, int]]:
    """For bins of the largest probability: its mean, the share that is right, and how many there are."""
    sure, predicted = probabilities.max(1)
    bins = (sure * BINS).long().clamp(max=BINS - 1)
    found = []
    for i in range(BINS):
        here = bins == i
        if here.any():
            right = (predicted == labels)[here].double().mean().item()
            found.append((sure[here].mean().item(), right, int(here.sum())))
    return found


def calibration_error(rows: Sequence[tuple[float, float, int]]) -> float:
    """The mean difference between how sure and how often right (Naeini, Cooper & Hauskrecht 2015)."""
    total = sum(count for _, _, count in rows)
    return sum(count * abs(sure - right) for sure, right, count in rows) / total


def draw(rows: dict[str, list[tuple[float, float, int]]], path: Path) -> None:
    """The share that is right against how sure the predictions are."""
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="as sure as right")
    for (name, own), color in zip(rows.items(), COLORS, strict=True):
        sure, right, counts = zip(*own, strict=True)
        axes.plot(sure, right, color=color, label=f"{name}: off by {calibration_error(own):.1%}")
        axes.scatter(sure, right, [4 + 0.3 * count for count in counts], color=color)
    axes.set(
        xlabel="how sure: probability of the predicted digit",
        ylabel="how often right",
        title="digits that were not seen",
        xlim=(0, 1.02),
        ylim=(0, 1.25),
        yticks=(0, 0.2, 0.4, 0.6, 0.8, 1),
    )
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def predict_in_three_ways(data: Data, held_out: Data, x: Tensor, args: Any) -> dict[str, Tensor]:
    """The classes' probabilities, by name of the way."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    train(model, data, args.decay)
    with torch.no_grad():
        predictions = {"network": model(x).softmax(1)}

    F_sum = curvature(model, data, eigenvalues=args.eigenvalues)
    losses = {
        precision: F.nll_loss(predict(model, held_out[0], F_sum, precision).log(), held_out[1])
        for precision in PRECISIONS
    }
    precision = min(losses, key=lambda one: losses[one].item())
    print(f"precision of the prior for digits held out: {precision:g}")
    predictions["Laplace approximation"] = predict(model, x, F_sum, precision)

    for _ in range(args.rounds):  # weights and precision in turn, both by the evidence
        F_sum = curvature(model, data, eigenvalues=args.eigenvalues)
        theta = nn.utils.parameters_to_vector(model.parameters()).detach()
        precision = choose_by_evidence(F_sum, theta)
        train(model, data, precision / len(data[0]))
    print(f"precision of the prior by the evidence: {precision:.2g}")
    with torch.no_grad():
        predictions["trained by the evidence"] = model(x).softmax(1)
    return predictions


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, approximate the posterior, predict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=600, help="how many digits to train on")
    parser.add_argument(
        "--noise", type=float, default=0.5, help="standard deviation; pixels are in [0, 1]"
    )
    parser.add_argument(
        "--decay", type=float, default=1e-6, help="weight decay of the first training"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of training by the evidence")
    parser.add_argument(
        "--eigenvalues", action="store_true", help="correct the factors' eigenvalues (EKFAC)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    data, held_out, (x, labels) = load(args.train, args.noise, args.seed)
    rows = {}
    for name, probabilities in predict_in_three_ways(data, held_out, x, args).items():
        rows[name] = reliability(probabilities, labels)
        right = (probabilities.argmax(1) == labels).double().mean().item()
        loss = F.nll_loss(probabilities.log(), labels).item()
        error = calibration_error(rows[name])
        print(f"{name}: {right:.1%} right, negative log-likelihood {loss:.3f}, off by {error:.1%}")
    draw(rows, args.figure)
    print(args.figure)


if __name__ == "__main__":
    main()
