"""Draws at the model's outputs: their covariance is the metric there."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.metrics import output_metric_of
from helpers.problems import multivariate_normal, positive, seeded
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Dirichlet, Independent, Normal, Poisson

from ngd_optim.curvature.metric import OutputMetric
from ngd_optim.kronecker.sampling import draw

N, C, D = 3, 4, 2
COPIES = 3_000
STANDARD_ERRORS = 5.5
"""Some five thousand entries are compared: the chance that one of them is that far away is 2e-4."""


def metric_at(z: Tensor, closure: Callable[[Tensor], Any]) -> OutputMetric:
    z = z.clone().requires_grad_()
    return output_metric_of(lambda: closure(z * 1), [z], "auto")


def rows(tensors: Any, copies: int) -> Tensor:
    """Tensors that begin with a batch of so many copies → a row for each copy."""
    return torch.cat([t.reshape(copies, -1) for t in tensors], 1)


def dense(metric: OutputMetric, copies: int) -> Tensor:
    """One copy's block of ``H_z``; the copies know nothing of each other."""
    columns = []
    for i, z in enumerate(metric.outputs):
        for j in range(z.numel() // copies):
            unit = [torch.zeros_like(other) for other in metric.outputs]
            unit[i].view(copies, -1)[:, j] = 1
            columns.append(rows(metric.apply_hessian(unit), copies)[0])
    return torch.stack(columns, 1)


def covariance(u: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of ``u uᵀ`` over the rows, and its standard error."""
    mean, mean_square = u.T @ u / len(u), u.square().T @ u.square() / len(u)
    return mean, ((mean_square - mean.square()).clamp(min=0) / len(u)).sqrt()


@dataclass(frozen=True)
class Case:
    """A closure of outputs ``z``, of shape ``(COPIES · N, *shape)``: N samples, and then the same again and again."""

    closure: Callable[[Tensor], Any]
    shape: tuple[int, ...] = (C,)


def of_copies(case: Case) -> OutputMetric:
    z = torch.randn(N, *case.shape, dtype=torch.float64)
    return metric_at(z.repeat(COPIES, *[1] * len(case.shape)), case.closure)


def each(z: Tensor, values: Any) -> Tensor:
    """The same targets for all copies."""
    values = torch.as_tensor(values)
    values = values.to(z.dtype) if values.is_floating_point() else values
    return values.repeat(len(z) // N, *[1] * (values.ndim - 1))


LABELS = torch.tensor([1, 0, 3])
PIXELS = torch.tensor([[1, 0], [3, 2], [2, 2]])
SHARES = torch.tensor([[0.1, 0.9, 0.5, 0.0], [1.0, 0.0, 0.3, 0.7], [0.2, 0.2, 0.6, 1.0]])
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0])

ROW_WEIGHTS = torch.tensor([[1.0], [0.0], [3.0]])

DIAGONAL = {
    "mse": Case(lambda z: F.mse_loss(z, z.detach() + 1)),
    "weighted mse": Case(
        lambda z: (each(z, ROW_WEIGHTS) * F.mse_loss(z, each(z, SHARES), reduction="none")).mean()
    ),
    "bce_with_logits": Case(
        lambda z: F.binary_cross_entropy_with_logits(
            z, each(z, SHARES), each(z, ROW_WEIGHTS), pos_weight=CLASS_WEIGHTS.to(z)
        )
    ),
    "nll_loss": Case(lambda z: F.nll_loss(z.log_softmax(-1), each(z, LABELS))),
    "poisson": Case(lambda z: F.poisson_nll_loss(z, each(z, SHARES))),
    "huber": Case(lambda z: F.huber_loss(z, each(z, SHARES), delta=0.7)),
    "Bernoulli": Case(lambda z: (z.mean(), Bernoulli(logits=z))),
    "Normal": Case(lambda z: (z.mean(), Independent(Normal(z, positive(z)), 1))),
    "list of heads": Case(lambda z: (z.mean(), [Poisson(z.exp()), {"b": Normal(z, 0.5)}])),
}
SOFTMAX = {
    "cross_entropy": Case(lambda z: F.cross_entropy(z, each(z, LABELS))),
    "class weights": Case(lambda z: F.cross_entropy(z, each(z, LABELS), CLASS_WEIGHTS.to(z))),
    "ignore_index": Case(lambda z: F.cross_entropy(z, each(z, LABELS), ignore_index=0)),
    "label smoothing": Case(
        lambda z: F.cross_entropy(z, each(z, LABELS), CLASS_WEIGHTS.to(z), label_smoothing=0.2)
    ),
    "soft targets": Case(lambda z: F.cross_entropy(z, each(z, SHARES), reduction="sum")),
    "pixels": Case(lambda z: F.cross_entropy(z, each(z, PIXELS)), (C, D)),
    "pixels of an image": Case(lambda z: F.cross_entropy(z, each(z, PIXELS)[:, None]), (C, 1, D)),
    "Categorical": Case(lambda z: (z.mean(), Categorical(logits=z))),
    "Categorical, several": Case(
        lambda z: (z.mean(), Independent(Categorical(logits=z), 1)), (D, C)
    ),
    "saturated": Case(
        lambda z: F.cross_entropy(each(z, [[800.0], [1.0], [3.0]]) * z, each(z, LABELS))
    ),
    "masked": Case(lambda z: (z.mean(), Categorical(logits=z + each(z, [[0, 0, -1e8, 0]] * N)))),
}
MIXED = {
    "softmax and diagonal": Case(
        lambda z: F.cross_entropy(z, each(z, LABELS)) + 0.1 * F.mse_loss(z, each(z, SHARES))
    ),
    "two dimensions": Case(
        lambda z: (
            F.cross_entropy(z.flatten(2), each(z, PIXELS))
            + F.huber_loss(z.square(), 0 * z.detach())
        ),
        (C, D),
    ),
}
CASES = {**DIAGONAL, **SOFTMAX, **MIXED}


@pytest.mark.parametrize("name", CASES)
def test_the_covariance_is_the_metric(name):
    metric = of_copies(CASES[name])
    u = draw(metric, seeded())
    assert [x.shape for x in u] == [z.shape for z in metric.outputs]
    expected = dense(metric, COPIES)
    found, error = covariance(rows(u, COPIES))
    assert ((found - expected).abs() <= STANDARD_ERRORS * error + 1e-9 * expected.abs().max()).all()
    assert error.max() <= 0.05 * expected.diagonal().max()  # the comparison can tell


@pytest.mark.parametrize("name", DIAGONAL)
def test_of_a_diagonal_metric_only_the_signs_are_drawn(name):
    metric = of_copies(DIAGONAL[name])
    first, second = (rows(draw(metric, seeded(seed)), COPIES) for seed in (1, 2))
    diagonal = dense(metric, COPIES).diagonal()
    torch.testing.assert_close(first.square(), diagonal.expand_as(first), rtol=1e-9, atol=1e-15)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", SOFTMAX)
def test_of_a_softmax_a_class_is_drawn(name):
    """A draw has rank one in each position: ``√w (e_y − p)``, which sums to zero over the classes."""
    metric = of_copies(SOFTMAX[name])
    (u,) = draw(metric, seeded())
    dim = -1 if u.ndim == 2 or "several" in name else 1
    assert u.sum(dim).abs().max() <= 1e-9 * u.abs().max()
    assert (u > 0).sum(dim).max() == 1


def learned_target(z: Tensor) -> Tensor:
    return F.mse_loss(z, 2 * z.flip(-1), reduction="sum")


@pytest.mark.parametrize(
    "case",
    [
        Case(lambda z: (z.mean(), multivariate_normal(z)), (5,)),
        Case(lambda z: (z.mean(), Dirichlet(positive(z)))),
        Case(learned_target, (2,)),
    ],
    ids=["MultivariateNormal", "Dirichlet", "learned target"],
)
def test_of_any_other_metric_the_diagonal_is_estimated(case):
    metric = of_copies(case)
    expected = dense(metric, COPIES)
    found, error = covariance(rows(draw(metric, seeded()), COPIES))
    slack = STANDARD_ERRORS * error + 1e-12
    diagonal, others = expected.diagonal(), (expected - expected.diagonal().diag()).square().sum(0)
    # The mean of four probes d, with mean h and variance Σ h² / 4, is cut at zero: E max(d, 0) ≤ ½ (h + √E d²).
    highest = 0.5 * (diagonal + (diagonal.square() + others / 4).sqrt())
    assert (found.diagonal() >= diagonal - slack.diagonal()).all()
    assert (found.diagonal() <= highest + slack.diagonal()).all()
    assert ((found - found.diagonal().diag()).abs() <= slack).all()


@pytest.mark.parametrize("logits", [[0.3, -1.0, 0.5], [0.0, 0.0], [40.0, 0.0, -3.0]], ids=str)
@pytest.mark.parametrize("shape", [(-1,), (1, -1)], ids=["vector", "one sample"])
def test_of_one_sample_each_draw_is_one_of_the_classes(logits, shape):
    z = torch.tensor(logits, dtype=torch.float64)
    closure = lambda z: 2 * F.cross_entropy(z, torch.zeros(z.shape[:-1], dtype=torch.long))  # noqa: E731
    metric = metric_at(z.view(shape), closure)
    drawn = torch.stack([draw(metric, seeded(seed))[0].flatten() for seed in range(400)])
    p = z.softmax(-1)
    possible = math.sqrt(2) * (torch.eye(len(z)).double() - p)
    distance = torch.cdist(drawn, possible)
    assert (distance.min(1).values <= 1e-6).all()
    frequency = F.one_hot(distance.argmin(1), len(z)).double().mean(0)
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / 400).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["cross_entropy", "label smoothing", "bce_with_logits", "Categorical", "Normal"]
)
def test_coarse_outputs_have_the_draws_of_fine_ones(name, dtype):
    """The same random numbers, so what differs is rounding."""
    z = (3 * torch.randn(100 * N, C)).to(torch.bfloat16)
    closure = CASES[name].closure

    def cast(z: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return closure(z)

    metric, exact = metric_at(z.to(dtype), cast), metric_at(z.double(), closure)
    coarse, fine = draw(metric, seeded()), draw(exact, seeded())
    assert [u.dtype for u in coarse] == [output.dtype for output in metric.outputs]
    sizes = torch.stack(
        [torch.stack([u.double().norm() for u in draws]) for draws in (coarse, fine)]
    )
    torch.testing.assert_close(
        sizes[0], sizes[1], rtol=1e-5 if dtype == torch.float32 else 0.1, atol=0
    )
    # No sample's weight may be lost in rounding: a draw is never longer than √(2w) for the largest weight w.
    for u, u_fine in zip(coarse, fine, strict=True):
        assert u.double().norm(dim=-1).max() <= 1.2 * u_fine.norm(dim=-1).max()


def test_a_saturated_softmax_gives_nothing_large():
    """Where ``p`` is 1 up to rounding, the weight of a sample is 0 / 0, and its draw must not be."""
    logits = torch.tensor(
        [[0, -16.6, -92], [0, -40, -60], [0, -104, -104], [0, -17, -17], [5, 5.1, 4.9]]
    )
    metric = metric_at(
        logits.repeat(50, 1), lambda z: F.cross_entropy(z, torch.zeros(250, dtype=torch.long))
    )
    for seed in range(30):
        (u,) = draw(metric, seeded(seed))
        assert u.norm(dim=-1).max() <= math.sqrt(2.01 / 250)
        assert u.view(50, 5, 3)[:, :4].norm(dim=-1).max() <= 1e-3


@pytest.mark.parametrize(
    "loss", [F.mse_loss, lambda z, _: F.cross_entropy(z, z[:, 0].long(), reduction="sum")]
)
def test_an_empty_batch(loss):
    (u,) = draw(metric_at(torch.zeros(0, C), lambda z: loss(z, torch.zeros(0, C))), seeded())
    assert u.shape == (0, C)


@pytest.mark.parametrize("name", ["cross_entropy", "bce_with_logits", "Categorical"])
def test_nan_outputs_give_nan(name):
    z = torch.randn(N, C)
    z[1, 2] = math.nan
    closure = {"Categorical": lambda z: (z.sum(), Categorical(logits=z, validate_args=False))}
    metric = metric_at(z, closure.get(name, CASES[name].closure))
    assert not all(u.isfinite().all() for u in draw(metric, seeded()))


def test_the_generator_is_the_only_source():
    metric = of_copies(MIXED["softmax and diagonal"])
    state = torch.get_rng_state()
    first, again, other = (rows(draw(metric, seeded(seed)), COPIES) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
