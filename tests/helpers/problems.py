"""Small models, predictions and dense matrices that the tests share. Float64, if not said otherwise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    ContinuousBernoulli,
    Dirichlet,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Poisson,
    TransformedDistribution,
    kl_divergence,
)
from torch.distributions.transforms import AffineTransform, ExpTransform, TanhTransform
from torch.func import functional_call, hessian, jacrev
from torch.utils.data import TensorDataset

BATCH = 5


def assert_near(found: Tensor, true: Tensor, rtol: float = 1e-8) -> None:
    """Agreement in norm, with a truth that is no zero vector."""
    assert found.shape == true.shape
    size = true.norm().item()
    assert size > 1e-6
    error = (found - true).norm().item() / size
    assert error <= rtol, f"relative error {error:.2e}"


def real(*shape: int) -> Tensor:
    """Normal random numbers."""
    return torch.randn(*shape, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    """A new generator."""
    return torch.Generator().manual_seed(seed)


def dataset() -> TensorDataset:
    """48 points with 8 features, in float32, that belong to four classes more or less."""
    generator = seeded(1)
    x = torch.randn(48, 8, generator=generator)
    return TensorDataset(x, (x[:, :4] + 0.5 * torch.randn(48, 4, generator=generator)).argmax(1))


def flatten(tensors: Any) -> Tensor:
    """A detached flat copy."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def make_model(kind: str, outputs: int) -> tuple[nn.Module, Tensor]:
    """A small model and its input."""
    if kind == "conv":
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, outputs))
        return model.double(), torch.randn(BATCH, 1, 3, 3, dtype=torch.float64)
    layers = {
        "linear": [nn.Linear(3, outputs)],
        "mlp": [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)],
    }
    return nn.Sequential(*layers[kind]).double(), torch.randn(BATCH, 3, dtype=torch.float64)


def flat_function(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The model's output as a function of its flat parameters."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def output(theta: Tensor) -> Tensor:
        pieces = zip(named.items(), theta.split(sizes), strict=True)
        return functional_call(model, {name: piece.view_as(p) for (name, p), piece in pieces}, (x,))

    return output


def heads(prediction: Any) -> list[Any]:
    """The distributions in a prediction."""
    if isinstance(prediction, dict):
        prediction = list(prediction.values())
    return (
        [head for part in prediction for head in heads(part)]
        if isinstance(prediction, list)
        else [prediction]
    )


def mean_kl(old: Any, new: Any) -> Tensor:
    """KL(old ‖ new), averaged over the batch and summed over heads."""
    return sum(kl_divergence(a, b).mean() for a, b in zip(heads(old), heads(new), strict=True))


def negative_log_likelihood(prediction: Any, data: list[Tensor]) -> Tensor:
    """The mean over the batch, summed over heads."""
    return -sum(head.log_prob(y).mean() for head, y in zip(heads(prediction), data, strict=True))


def dense_fisher(
    output: Callable[[Tensor], Tensor], theta: Tensor, predict: Callable[[Tensor], Any]
) -> Tensor:
    """The Hessian of the mean KL(old ‖ new) in the new parameters, at the old ones."""
    old = predict(output(theta).detach())
    return hessian(lambda t: mean_kl(old, predict(output(t))))(theta)


def dense_gauss_newton(
    output: Callable[[Tensor], Tensor], theta: Tensor, loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """Jᵀ H J."""
    z = output(theta)
    J = jacrev(output)(theta).reshape(z.numel(), -1)
    return J.T @ hessian(loss)(z).reshape(z.numel(), z.numel()) @ J


def jacobian_by_rows(z: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Row by row in plain autograd, which differentiates what torch.func cannot."""
    gradients = [
        grad(entry, params, retain_graph=True, materialize_grads=True) for entry in z.flatten()
    ]
    return torch.stack([flatten(gradient) for gradient in gradients])


def dense_gauss_newton_by_rows(
    outputs: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], params: Sequence[Tensor]
) -> Tensor:
    """Jᵀ H J by the Jacobian's rows."""
    z = outputs()
    J = jacobian_by_rows(z, params)
    return J.T @ hessian(lambda flat: loss(flat.view_as(z)))(z.detach().flatten()) @ J


@dataclass(frozen=True)
class Family:
    """A way to predict, from ``size`` numbers per sample.

    ``coordinates(z)`` has the distribution's parameters, one row for each of its independent draws, and
    ``information(row)`` is the Fisher matrix in them, from a textbook.
    """

    size: int
    predict: Callable[[Tensor], Any]
    coordinates: Callable[[Tensor], Tensor] | None = None
    information: Callable[[Tensor], Tensor] | None = None


def positive(z: Tensor) -> Tensor:
    return F.softplus(z) + 0.3


def halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """A location and a scale."""
    a, b = z.chunk(2, -1)
    return a, positive(b)


def pairs(z: Tensor) -> Tensor:
    """Locations and scales, a row for each pair."""
    return torch.stack(halves(z), -1).reshape(-1, 2)


def positive_pairs(z: Tensor) -> Tensor:
    return torch.stack(positive(z).chunk(2, -1), -1).reshape(-1, 2)


def multivariate_normal(z: Tensor) -> MultivariateNormal:
    loc, below, diagonal = z[:, :2], z[:, 2], positive(z[:, 3:])
    rows = [
        torch.stack([diagonal[:, 0], torch.zeros_like(below)], -1),
        torch.stack([below, diagonal[:, 1]], -1),
    ]
    return MultivariateNormal(loc, scale_tril=torch.stack(rows, -2), validate_args=False)


def nothing_checked(build: Callable[..., Any]) -> Callable[..., Any]:
    """Without argument checks, which torch.func.hessian cannot trace."""
    return lambda *args, **kwargs: build(*args, **kwargs, validate_args=False)


def diagonal(entries: Callable[..., list[Tensor]]) -> Callable[[Tensor], Tensor]:
    return lambda row: torch.stack(entries(*row)).diag()


def of_categorical(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return p.diag() - torch.outer(p, p)


def of_dirichlet(concentration: Tensor) -> Tensor:
    return torch.polygamma(1, concentration).diag() - torch.polygamma(1, concentration.sum())


def of_gamma(row: Tensor) -> Tensor:
    shape, rate = row
    return torch.stack([torch.polygamma(1, shape), -1 / rate, -1 / rate, shape / rate**2]).view(
        2, 2
    )


of_bernoulli = diagonal(lambda logit: [logit.sigmoid() * (-logit).sigmoid()])
of_normal = diagonal(lambda loc, scale: [scale**-2, 2 * scale**-2])
of_laplace = diagonal(lambda loc, scale: [scale**-2, scale**-2])
of_cauchy = diagonal(lambda loc, scale: [0.5 * scale**-2, 0.5 * scale**-2])


def column(z: Tensor) -> Tensor:
    return z.reshape(-1, 1)


_Bernoulli, _Beta, _Binomial, _Categorical = map(
    nothing_checked, (Bernoulli, Beta, Binomial, Categorical)
)
_Cauchy, _ContinuousBernoulli, _Dirichlet = map(
    nothing_checked, (Cauchy, ContinuousBernoulli, Dirichlet)
)
_Exponential, _Gamma, _Geometric, _Gumbel = map(
    nothing_checked, (Exponential, Gamma, Geometric, Gumbel)
)
_HalfNormal, _Independent, _Laplace, _LogNormal = map(
    nothing_checked, (HalfNormal, Independent, Laplace, LogNormal)
)
_LowRank, _Normal = map(nothing_checked, (LowRankMultivariateNormal, Normal))
_OneHotCategorical, _Poisson, _Transformed = map(
    nothing_checked, (OneHotCategorical, Poisson, TransformedDistribution)
)

FAMILIES = {
    "categorical_logits": Family(3, lambda z: _Categorical(logits=z), lambda z: z, of_categorical),
    "categorical_probs": Family(
        3, lambda z: _Categorical(probs=z.softmax(-1)), lambda z: z, of_categorical
    ),
    "one_hot_categorical": Family(
        3, lambda z: _OneHotCategorical(logits=z), lambda z: z, of_categorical
    ),
    "bernoulli": Family(2, lambda z: _Bernoulli(logits=z), column, of_bernoulli),
    "bernoulli_probs": Family(2, lambda z: _Bernoulli(probs=z.sigmoid()), column, of_bernoulli),
    "binomial": Family(
        2, lambda z: _Binomial(4, logits=z), column, lambda row: 4 * of_bernoulli(row)
    ),
    "normal": Family(4, lambda z: _Normal(*halves(z)), pairs, of_normal),
    "normal_fixed_scale": Family(
        2, lambda z: _Normal(z, 0.7), column, diagonal(lambda loc: [loc * 0 + 0.7**-2])
    ),
    "independent_normal": Family(
        4, lambda z: _Independent(_Normal(*halves(z)), 1), pairs, lambda row: 2 * of_normal(row)
    ),
    "multivariate_normal": Family(5, multivariate_normal),
    "low_rank_normal": Family(6, lambda z: _LowRank(z[:, :2], z[:, 2:4, None], positive(z[:, 4:]))),
    "poisson": Family(
        2, lambda z: _Poisson(z.exp()), column, diagonal(lambda log_rate: [log_rate.exp()])
    ),
    "gamma": Family(4, lambda z: _Gamma(*positive(z).chunk(2, -1)), positive_pairs, of_gamma),
    "beta": Family(4, lambda z: _Beta(*positive(z).chunk(2, -1)), positive_pairs, of_dirichlet),
    "dirichlet": Family(3, lambda z: _Dirichlet(positive(z)), positive, of_dirichlet),
    "laplace": Family(4, lambda z: _Laplace(*halves(z)), pairs, of_laplace),
    "independent_laplace": Family(
        4, lambda z: _Independent(_Laplace(*halves(z)), 1), pairs, lambda row: 2 * of_laplace(row)
    ),
    "nested_independent_laplace": Family(
        4,
        lambda z: _Independent(_Independent(_Laplace(*halves(z[:, None])), 1), 1),
        pairs,
        lambda row: 2 * of_laplace(row),
    ),
    "log_laplace": Family(
        4, lambda z: _Transformed(_Laplace(*halves(z)), [ExpTransform()]), pairs, of_laplace
    ),
    "exponential": Family(
        2, lambda z: _Exponential(z.exp()), column, diagonal(lambda z: [torch.ones_like(z)])
    ),
    "geometric": Family(
        2, lambda z: _Geometric(logits=z), column, diagonal(lambda logit: [(-logit).sigmoid()])
    ),
    "log_normal": Family(4, lambda z: _LogNormal(*halves(z)), pairs, of_normal),
    "half_normal": Family(
        2, lambda z: _HalfNormal(z.exp()), column, diagonal(lambda z: [2 * torch.ones_like(z)])
    ),
    "cauchy": Family(4, lambda z: _Cauchy(*halves(z)), pairs, of_cauchy),
    "gumbel": Family(4, lambda z: _Gumbel(*halves(z))),
    "continuous_bernoulli": Family(2, lambda z: _ContinuousBernoulli(logits=z)),
    "tanh_normal": Family(
        4,
        lambda z: _Transformed(
            _Independent(_Normal(*halves(z)), 1), [AffineTransform(0.1, 0.5), TanhTransform()]
        ),
    ),
    "list": Family(7, lambda z: [_Categorical(logits=z[:, :3]), _Normal(*halves(z[:, 3:]))]),
    "dict": Family(
        5,
        lambda z: {
            "a": _Bernoulli(logits=z[:, :1]),
            "b": [_Gamma(*positive(z[:, 1:]).chunk(2, -1))],
        },
    ),
}


class StepProblem:
    """One small training problem in three forms of closure, and what is known about it densely.

    ``loss`` and ``kl`` are functions of the flat parameters; ``kl`` is None where the metric has only its second order.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self.model, self.x = make_model("mlp", 3)
        self.output = flat_function(self.model, self.x)
        self.theta = flatten(self.model.parameters())
        old = Categorical(logits=self.output(self.theta))
        action = old.sample()
        advantage = torch.randn(BATCH, dtype=torch.float64)
        old_log_prob = old.log_prob(action)

        def surrogate(z: Tensor) -> Tensor:
            ratio = (_Categorical(logits=z).log_prob(action) - old_log_prob).exp()
            return -(ratio * advantage).mean()

        def cross_entropy(z: Tensor) -> Tensor:
            return F.cross_entropy(z, action)

        self._of_output = cross_entropy if form == "ggn" else surrogate
        self._kl_of_output = lambda z: kl_divergence(old, _Categorical(logits=z)).mean()
        self.calls = 0

    def closure(self) -> Any:
        self.calls += 1
        z = self.model(self.x)
        loss = self._of_output(z)
        if self.form == "fisher":
            return loss, Categorical(logits=z)
        return (loss, self._kl_of_output(z)) if self.form == "kl" else loss

    def loss(self, theta: Tensor) -> Tensor:
        return self._of_output(self.output(theta))

    def kl(self, theta: Tensor) -> float | None:
        return None if self.form == "ggn" else self._kl_of_output(self.output(theta)).item()

    @property
    def gradient(self) -> Tensor:
        return torch.func.grad(self.loss)(self.theta)

    @property
    def curvature(self) -> Tensor:
        if self.form == "ggn":
            return dense_gauss_newton(self.output, self.theta, self._of_output)
        return hessian(lambda t: self._kl_of_output(self.output(t)))(self.theta)

    @property
    def moved(self) -> Tensor:
        return flatten(self.model.parameters())
