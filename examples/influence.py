"""Influence functions find labels that are wrong.

One in ten of 500 of scikit-learn's handwritten digits gets a wrong label, and a small network learns them. To leave out
a sample with the gradient gᵢ would move the weights by (F + λI)⁻¹ gᵢ / N (Koh & Liang 2017), with F as Kronecker
factors whose eigenvalues are corrected (Grosse et al. 2023). So a sample's influence on its own loss is
gᵢᵀ (F + λI)⁻¹ gᵢ / N. Where it is large few others say the same: wrong labels come first.

Run it:

    python examples/influence.py
    python examples/influence.py --train 1000 --wrong 0.05

It compares the influences with a solve by conjugate gradients and with networks that were trained anew without a
sample, prints how many wrong labels are found, and draws the digits that it suspects.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ngd_optim import NaturalCG, conjugate_gradient, linearize
from ngd_optim.factors import kronecker_factors

SHOWN = 24
DECAY = 3e-3


def load(count: int, wrong: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels of which a share is wrong, and the true ones."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)[:count]
    x, truth = torch.as_tensor(images)[order] / 16, torch.as_tensor(labels)[order]
    other = (truth + torch.randint(1, 10, (count,), generator=generator)) % 10
    return x, torch.where(torch.rand(count, generator=generator) < wrong, other, truth), truth


def train(model: nn.Module, x: Tensor, y: Tensor, weights: Tensor, steps: int) -> None:
    """To the minimum of the weighted mean of the losses, and of the weight decay."""
    optimizer = NaturalCG(model.parameters(), weight_decay=DECAY, damping=1e-3)

    def closure() -> Tensor:
        return (weights * F.cross_entropy(model(x), y, reduction="none")).sum() / len(x)

    for _ in range(steps):
        optimizer.step(closure)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Those of all samples, shape (samples, n)."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], a: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (a,)), label)

    by_name = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in by_name.values()], 1)


def retrain_without(model: nn.Module, x: Tensor, y: Tensor, samples: Sequence[int]) -> list[float]:
    """By how much the loss of each of some samples is higher if it is left out of the training."""
    start = {name: p.detach().clone() for name, p in model.state_dict().items()}
    changes: list[float] = []
    for i in samples:
        weights = torch.ones(len(x))
        weights[i] = 0
        with torch.no_grad():
            before = F.cross_entropy(model(x[i]), y[i]).item()
        train(model, x, y, weights, 15)
        with torch.no_grad():
            changes.append(F.cross_entropy(model(x[i]), y[i]).item() - before)
        model.load_state_dict(start)
    return changes


def correlate(a: Tensor, b: Tensor) -> float:
    """The rank correlation (Spearman)."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def solve_exactly(closure: Callable[[], Tensor], model: nn.Module, g: Tensor) -> Tensor:
    """``(F + λI)⁻¹ g`` with the Gauss-Newton matrix itself."""
    point = linearize(closure, model.parameters())
    return conjugate_gradient(
        lambda v: point.curvature(v) + DECAY * v, g, tol=1e-8, max_iters=5000, progress_tol=0.0
    ).solution


def draw(x: Tensor, y: Tensor, truth: Tensor, order: Tensor, path: Path) -> None:
    """How many wrong labels are found, and the digits that come first."""
    wrong = (y != truth)[order]
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35)).tolist()  # pyright: ignore[reportAttributeAccessIssue]
    axes = left.subplots()
    looked = torch.arange(1, len(y) + 1)
    axes.plot(looked, wrong.cumsum(0), color="tab:blue", label="by influence")
    axes.plot(looked, looked * wrong.double().mean(), color="0.7", label="by chance")
    axes.set(xlabel="digits looked at", ylabel="wrong labels found")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    right.suptitle("the most influential on themselves: label (truth)", fontsize=11)
    for place, i in zip(right.subplots(3, SHOWN // 3).flat, order.tolist(), strict=False):
        place.imshow(x[i].view(8, 8), cmap="gray_r")
        is_wrong = bool(y[i] != truth[i])
        text = f"{y[i]} ({truth[i]})" if is_wrong else f"{y[i]}"
        place.set_title(text, fontsize=9, color="tab:red" if is_wrong else "black")
        place.axis("off")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, rank the samples by their influence on themselves, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=500, help="how many digits")
    parser.add_argument("--wrong", type=float, default=0.1, help="share of wrong labels")
    parser.add_argument("--retrained", type=int, default=20, help="samples to leave out in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(args.seed)
    x, y, truth = load(args.train, args.wrong, args.seed)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    train(model, x, y, torch.ones(len(x)), 60)

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    curvature = kronecker_factors(closure, model.named_parameters(), eigenvalues=True)
    g = gradients(model, x, y)
    solved = curvature.solve(g.T, DECAY)  # the weight decay is λ
    influence = (g * solved.T).sum(1) / len(x)
    order = influence.argsort(descending=True)
    found = (y != truth)[order[: int((y != truth).sum())]].double().mean().item()
    print(f"{found:.0%} of the wrong labels are among as many that come first")
    some = order[:: max(1, len(order) // args.retrained)][: args.retrained]
    exact = [(g[i] @ solve_exactly(closure, model, g[i])).item() / len(x) for i in some]
    print(
        f"rank correlation with the exact solve: {correlate(influence[some], torch.tensor(exact)):.2f}"
    )
    changes = retrain_without(model, x, y, some.tolist())
    print(
        f"rank correlation with training anew: {correlate(influence[some], torch.tensor(changes)):.2f}"
    )
    draw(x, y, truth, order, args.figure)
    print(args.figure)


if __name__ == "__main__":
    main()
