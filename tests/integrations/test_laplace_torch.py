"""The backend for laplace-torch that docs/laplace.md has to copy, beside laplace-torch's own."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.problems import assert_near, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

laplace = pytest.importorskip(
    "laplace", reason="laplace-torch is not installed: it pins packages that few other things need"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of laplace-torch and what it imports

PAGE = Path(__file__).parents[2] / "docs" / "laplace.md"


@pytest.fixture(scope="module")
def backend() -> Any:
    (block,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict[str, Any] = {}
    exec(compile(block, PAGE.name, "exec"), namespace)
    return namespace["TracedGGN"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.cell(x)[0][:, -1]))


class Flipped(nn.Module):
    """``x @ weight + bias``, as in GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def straight() -> nn.Module:
    other, layer = Flipped(), nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight.copy_(other.weight.T)
        layer.bias.copy_(other.bias)
    return layer


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)), (3,)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)),
        (2, 3, 3),
    ),
}


def data(shape: tuple[int, ...], likelihood: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(30, *shape)
    return x, torch.randint(0, 4, (30,)) if likelihood == "classification" else torch.randn(30, 4)


def fit(model: nn.Module, x: Tensor, y: Tensor, likelihood: str, backend: Any) -> Any:
    posterior = laplace.Laplace(model, likelihood, "all", "kron", backend=backend)
    posterior.fit(DataLoader(TensorDataset(x, y), batch_size=10))
    return posterior


def flat_outputs(predicted: Any) -> tuple[Tensor, ...]:
    return predicted if isinstance(predicted, tuple) else (predicted,)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_are_those_of_its_own_backend(name, likelihood, backend):
    make, shape = MODELS[name]
    (x, y), model = data(shape, likelihood), make()
    found, own = (
        fit(model, x, y, likelihood, one) for one in (backend, laplace.curvature.CurvlinopsGGN)
    )
    assert_near(found.H_facs.to_matrix(), own.H_facs.to_matrix(), 1e-5)
    assert_near(found.log_marginal_likelihood(), own.log_marginal_likelihood(), 1e-5)
    for a, b in zip(flat_outputs(found(x)), flat_outputs(own(x)), strict=True):
        assert_near(a, b, 1e-4)
    assert_near(found.loss, own.loss, 1e-5)


def test_layers_that_it_does_not_know_have_factors(backend):
    (x, y), model = data((6, 3), "classification"), Recurrent()
    with pytest.raises(NotImplementedError, match="un-supported layers"):
        fit(model, x, y, "classification", laplace.curvature.CurvlinopsGGN)
    posterior = fit(model, x, y, "classification", backend)
    exact = laplace.Laplace(model, "classification", "all", "full", backend=backend)
    exact.fit(DataLoader(TensorDataset(x, y), batch_size=10))
    assert (exact.H.diagonal() - posterior.H_facs.diag()).norm() < 0.5 * exact.H.diagonal().norm()
    posterior.optimize_prior_precision(method="marglik")
    assert posterior(x).sum(1).allclose(torch.ones(30))


def test_a_weight_used_from_the_other_side_is_turned(backend):
    x, y = data((3,), "classification")
    torch.manual_seed(1)
    turned = fit(nn.Sequential(Flipped()), x, y, "classification", backend).H_facs
    torch.manual_seed(1)
    as_it_is = fit(nn.Sequential(straight()), x, y, "classification", backend).H_facs
    for ours, theirs in zip(turned.kfacs[0], reversed(as_it_is.kfacs[0]), strict=True):
        assert_near(ours, theirs, 1e-5)
    assert_near(turned.kfacs[1][0], as_it_is.kfacs[1][0], 1e-5)


def test_random_draws_and_the_last_layer(backend):
    (x, y), model = data((3,), "classification"), MODELS["mlp"][0]()
    exact = backend(model, "classification").kron(x, y, 30)[1]
    torch.manual_seed(0)
    drawn = backend(model, "classification", stochastic=True, num_samples=500).kron(
        x, y, 30, generator=seeded()
    )[1]
    assert_near(drawn.to_matrix(), exact.to_matrix(), 0.2)
    last = laplace.Laplace(model, "classification", "last_layer", "kron", backend=backend)
    last.fit(DataLoader(TensorDataset(x, y), batch_size=10))
    assert len(last.H_facs.kfacs) == 1
    assert last(x).sum(1).allclose(torch.ones(30))


def test_what_it_has_no_form_for_is_refused(backend):
    (x, y), model = (
        data((4, 3, 3), "classification"),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()),
    )
    with pytest.raises(ValueError, match=r"no form for the curvature of 0\.weight, 0\.bias"):
        backend(model, "classification").kron(x, y, 30)
