"""Every distribution has a Fisher matrix, the dense Hessian of its KL, or a sentence; so has a returned KL."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near, flat_function, flatten, make_model
from torch import Tensor, nn
from torch import distributions as D
from torch.distributions.kl import register_kl

from ngd_optim import NaturalCG, linearize

FORM_C = r"return \(loss, kl\) from the closure instead"


def positive(z: Tensor) -> Tensor:
    return F.softplus(z) + 0.2


def triangle(z: Tensor) -> Tensor:
    """Three numbers → the Cholesky factor of a 2×2 matrix."""
    return torch.diag_embed(positive(z[:, :2])) + F.pad(z[:, 2, None, None], (0, 1, 1, 0))


def pair(kind, **settings):
    return lambda z: kind(positive(z[:, :2]), positive(z[:, 2:]), **settings)


def location_scale(kind):
    return lambda z: kind(z[:, :2], positive(z[:, 2:]))


def transformed(*transforms):
    def make(z):
        return D.TransformedDistribution(
            D.Independent(D.Normal(z[:, :2], positive(z[:, 2:])), 1), list(transforms)
        )

    return make


WITH_FISHER = {
    # name: (numbers per sample, distribution)
    "Bernoulli": (2, lambda z: D.Bernoulli(logits=z)),
    "Beta": (4, pair(D.Beta)),
    "Binomial": (2, lambda z: D.Binomial(3, logits=z)),
    "Binomial of probs": (2, lambda z: D.Binomial(3, probs=z.sigmoid())),
    "Categorical": (3, lambda z: D.Categorical(logits=z)),
    "Cauchy": (4, location_scale(D.Cauchy)),
    "Chi2": (2, lambda z: D.Chi2(positive(z))),
    "ContinuousBernoulli": (2, lambda z: D.ContinuousBernoulli(logits=z)),
    "Dirichlet": (3, lambda z: D.Dirichlet(positive(z))),
    "Exponential": (2, lambda z: D.Exponential(positive(z))),
    "Gamma": (4, pair(D.Gamma)),
    "Geometric": (2, lambda z: D.Geometric(logits=z)),
    "Geometric of probs": (2, lambda z: D.Geometric(probs=z.sigmoid())),
    "Gumbel": (4, location_scale(D.Gumbel)),
    "HalfCauchy": (2, lambda z: D.HalfCauchy(positive(z))),
    "HalfNormal": (2, lambda z: D.HalfNormal(positive(z))),
    "InverseGamma": (4, pair(D.InverseGamma)),
    "LogNormal": (4, location_scale(D.LogNormal)),
    "LogisticNormal": (4, location_scale(D.LogisticNormal)),
    "LowRankMultivariateNormal": (
        6,
        lambda z: D.LowRankMultivariateNormal(z[:, :2], z[:, 2:4, None], positive(z[:, 4:])),
    ),
    "MultivariateNormal": (
        5,
        lambda z: D.MultivariateNormal(z[:, :2], scale_tril=triangle(z[:, 2:])),
    ),
    "MultivariateNormal of a covariance": (
        5,
        lambda z: D.MultivariateNormal(z[:, :2], triangle(z[:, 2:]) @ triangle(z[:, 2:]).mT),
    ),
    "Normal": (4, location_scale(D.Normal)),
    "OneHotCategorical": (3, lambda z: D.OneHotCategorical(logits=z)),
    "OneHotCategoricalStraightThrough": (
        3,
        lambda z: D.OneHotCategoricalStraightThrough(logits=z),
    ),
    "Poisson": (2, lambda z: D.Poisson(positive(z))),
    "Independent of Independent": (
        4,
        lambda z: (
            D.Independent(D.Independent(location_scale(D.Normal)(z[:, None]), 0), 1)
            if z.ndim > 2
            else D.Independent(D.Independent(location_scale(D.Normal)(z), 1), 0)
        ),
    ),
    "expanded": (2, lambda z: D.Normal(z[:, :1], positive(z[:, 1:])).expand((5, 4))),
    "expanded Categorical": (3, lambda z: D.Categorical(logits=z).expand((2, 5))),
    "expanded LogNormal": (4, lambda z: location_scale(D.LogNormal)(z).expand((3, 5, 2))),
    "AffineTransform": (4, transformed(D.AffineTransform(1.0, 2.0))),
    "TanhTransform": (4, transformed(D.TanhTransform(), D.AffineTransform(0.0, 3.0))),
}

WITHOUT = {
    "FisherSnedecor": (4, pair(D.FisherSnedecor)),
    "Kumaraswamy": (4, pair(D.Kumaraswamy)),
    "Kumaraswamy with one that is learned": (2, lambda z: D.Kumaraswamy(positive(z), 2.0)),
    "LKJCholesky": (2, lambda z: D.LKJCholesky(2, positive(z))),
    "MixtureSameFamily": (
        4,
        lambda z: D.MixtureSameFamily(D.Categorical(logits=z[:, :2]), D.Normal(z[:, 2:], 1.0)),
    ),
    "Multinomial": (2, lambda z: D.Multinomial(3, logits=z)),
    "NegativeBinomial": (2, lambda z: D.NegativeBinomial(3, logits=z)),
    "Pareto": (4, pair(D.Pareto)),
    "RelaxedBernoulli": (2, lambda z: D.RelaxedBernoulli(torch.tensor(0.7), logits=z)),
    "RelaxedOneHotCategorical": (
        3,
        lambda z: D.RelaxedOneHotCategorical(torch.tensor(0.7), logits=z),
    ),
    "StudentT": (2, lambda z: D.StudentT(positive(z))),
    "Uniform": (2, lambda z: D.Uniform(z, z + 1)),
    "VonMises": (4, location_scale(D.VonMises)),
    "Weibull": (4, pair(D.Weibull)),
    "Weibull with one that is learned": (2, lambda z: D.Weibull(1.0, positive(z))),
    # torch's KL sums over the batch here, and is not at its minimum between two that are the same.
    "Wishart": (4, lambda z: D.Wishart(positive(z[:, 0]) + 3, scale_tril=triangle(z[:, 1:]))),
    "a learned AffineTransform": (
        4,
        lambda z: D.TransformedDistribution(
            D.Normal(z[:, :2], 1.0), D.AffineTransform(z[:, 2:], 1.0)
        ),
    ),
}


class Tempered(D.OneHotCategorical):
    """As in WiseRL's pull request 14."""

    def __init__(self, logits, temperature=2.0, validate_args=None):
        super().__init__(logits=logits / temperature, validate_args=validate_args)


class OfLogScale(D.Normal):
    def __init__(self, loc, scale, validate_args=None):
        super().__init__(loc, F.softplus(scale), validate_args=validate_args)


class Renamed(D.Gamma):
    def __init__(self, mean, dispersion):
        super().__init__(1 / dispersion, 1 / (mean * dispersion))


class Squashed(D.TransformedDistribution):
    """With constraints of its own."""

    arg_constraints = D.Normal.arg_constraints

    def __init__(self, loc, log_scale):
        super().__init__(D.Normal(loc, log_scale.exp()), [OfTheUser()])

    loc = property(lambda self: self.base_dist.loc)
    scale = property(lambda self: self.base_dist.scale)


class OfTheUser(D.Transform):
    """It cannot be compared with another."""

    domain = codomain = D.constraints.real
    bijective = True
    sign = 1

    def _call(self, x):
        return x.sinh()

    def _inverse(self, y):
        return y.asinh()

    def log_abs_det_jacobian(self, x, y):
        return x.cosh().log()


class Diagonal(D.Independent):
    """As Tianshou and others write it."""

    def __init__(self, z):
        super().__init__(D.Normal(z[:, :2], positive(z[:, 2:])), 1)


class Point(D.ExponentialFamily):
    """An exponential distribution whose KL is torch's for exponential families."""

    arg_constraints = {"rate": D.constraints.positive}  # noqa: RUF012

    def __init__(self, rate, validate_args=None):
        self.rate = rate
        super().__init__(rate.shape, validate_args=validate_args)

    @property
    def _natural_params(self):
        return (-self.rate,)

    def _log_normalizer(self, x):
        return -torch.log(-x)


SUBCLASSES = {
    # name: (numbers per sample, subclass, the same to kl_divergence)
    "temperature": (3, Tempered, lambda z: D.OneHotCategorical(logits=z / 2)),
    "softplus": (
        4,
        lambda z: OfLogScale(*z.chunk(2, 1)),
        lambda z: D.Normal(z[:, :2], F.softplus(z[:, 2:])),
    ),
    "other arguments": (
        4,
        lambda z: Renamed(*positive(z).chunk(2, 1)),
        lambda z: D.Gamma(1 / positive(z[:, 2:]), 1 / (positive(z[:, :2]) * positive(z[:, 2:]))),
    ),
    "transformed": (
        4,
        lambda z: Squashed(*z.chunk(2, 1)),
        lambda z: D.Normal(z[:, :2], z[:, 2:].exp()),
    ),
    "independent": (4, Diagonal, lambda z: D.Independent(location_scale(D.Normal)(z), 1)),
    "exponential family": (2, lambda z: Point(positive(z)), lambda z: D.Exponential(positive(z))),
    "within Independent": (
        4,
        lambda z: D.Independent(OfLogScale(*z.chunk(2, 1)), 1),
        lambda z: D.Independent(D.Normal(z[:, :2], F.softplus(z[:, 2:])), 1),
    ),
}


def dense_fisher(model, x, make):
    """The Hessian of the mean KL, by plain autograd in float64."""
    output, theta = flat_function(model, x), flatten(model.parameters())
    old = make(output(theta))
    return torch.autograd.functional.hessian(
        lambda t: D.kl_divergence(old, make(output(t))).mean(), theta
    )


def fisher(model, x, make):
    point = linearize(lambda: (model(x).sum(), make(model(x))), model.parameters())
    n = len(point.gradient)
    return torch.stack([point.curvature(unit) for unit in torch.eye(n, dtype=torch.float64)])


@pytest.mark.parametrize("name", WITH_FISHER)
def test_fisher_matrix_is_the_hessian_of_torchs_kl(name):
    size, make = WITH_FISHER[name]
    model, x = make_model("linear", size)
    assert_near(fisher(model, x, make), dense_fisher(model, x, make), rtol=1e-10)


def test_every_distribution_of_torch_is_in_a_table():
    own = {
        name
        for name in D.__all__
        if isinstance(getattr(D, name), type) and issubclass(getattr(D, name), D.Distribution)
    }
    abstract = {"Distribution", "ExponentialFamily", "Independent", "TransformedDistribution"}
    newer = {"GeneralizedPareto", "Laplace"}  # torch 2.8; and FAMILIES has its matrix
    assert own - abstract - newer <= WITH_FISHER.keys() | WITHOUT.keys()


@pytest.mark.parametrize("use", ["step", "linearize"])
@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_kl_the_way_out_is_named(name, use):
    size, make = WITHOUT[name]
    model, x = make_model("linear", size)
    before = flatten(model.parameters())

    def closure():
        return model(x).sum(), make(model(x))

    with pytest.raises(NotImplementedError, match=FORM_C):
        NaturalCG(model.parameters()).step(closure) if use == "step" else linearize(
            closure, model.parameters()
        )
    assert torch.equal(flatten(model.parameters()), before)


@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_subclass_is_what_it_is_to_kl_divergence(name):
    size, make, same = SUBCLASSES[name]
    model, x = make_model("mlp", size)
    assert_near(fisher(model, x, make), dense_fisher(model, x, same), rtol=1e-10)
    output, old = flat_function(model, x), same(model(x).detach())
    optimizer = NaturalCG(model.parameters(), max_kl=0.3, trust_region="boundary", max_backtracks=0)
    optimizer.step(lambda: (model(x).square().sum(), make(model(x))))
    new = same(output(flatten(model.parameters())))
    assert optimizer.last_step.kl == pytest.approx(
        D.kl_divergence(old, new).mean().item(), rel=1e-8
    )


class OwnKL(D.Normal):
    """A subclass with a KL of its own, which is twice that of a Normal."""


class Scaled(OwnKL):
    """And another constructor."""

    def __init__(self, loc, scale, validate_args=None):
        super().__init__(loc, 3 * scale, validate_args=validate_args)


class Biased(D.Normal):
    """Its KL has a gradient between two that are the same."""


class Hidden(D.Normal):
    """One of its parameters is in no constraint."""

    def __init__(self, loc, scale, shift=0.0, validate_args=None):
        self.shift = shift
        super().__init__(loc, scale, validate_args=validate_args)


class Nameless(D.Distribution):
    """It says nothing of its parameters."""

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)


class Flat(Nameless):
    arg_constraints = {}  # noqa: RUF012


@register_kl(OwnKL, OwnKL)
def _own_kl(p, q):
    return 2 * D.kl_divergence(D.Normal(p.loc, p.scale), D.Normal(q.loc, q.scale))


@register_kl(Biased, Biased)
def _biased_kl(p, q):
    return D.kl_divergence(D.Normal(p.loc, p.scale), D.Normal(q.loc, q.scale)) + 0.1 * (
        q.loc - p.loc
    )


@register_kl(Hidden, Hidden)
def _hidden_kl(p, q):
    return D.kl_divergence(D.Normal(p.loc + p.shift, p.scale), D.Normal(q.loc + q.shift, q.scale))


@register_kl(Nameless, Nameless)
def _nameless_kl(p, q):
    return (p.loc - q.loc).square() / 2


def test_a_kl_of_ones_own_counts():
    model, x = make_model("linear", 4)
    right = 2 * dense_fisher(model, x, location_scale(D.Normal))
    assert_near(fisher(model, x, location_scale(OwnKL)), right, rtol=1e-10)


OWN_REFUSED = {
    "a factor in the constructor": (
        location_scale(Scaled),
        "the constructor of Scaled changes the parameters",
    ),
    "a KL with a gradient": (location_scale(Biased), "is not zero with zero gradient"),
    "a parameter in no constraint": (
        lambda z: Hidden(z[:, :2], positive(z[:, 2:]), torch.ones(())),
        "is not zero with zero gradient",
    ),
    "no constraints": (lambda z: Nameless(z), "Nameless names no tensors"),
    "empty constraints": (lambda z: Flat(z), "Flat names no tensors"),
}


@pytest.mark.parametrize("name", OWN_REFUSED)
def test_what_cannot_be_rebuilt_is_refused(name):
    make, message = OWN_REFUSED[name]
    model, x = make_model("linear", 4)
    with pytest.raises(NotImplementedError, match=f"{message}.*{FORM_C}"):
        fisher(model, x, make)


def test_a_transform_that_follows_the_parameters_unseen_is_refused_at_the_trial_point():
    model, x = make_model("linear", 2)

    def closure():
        z = model(x)
        shifted = D.TransformedDistribution(D.Normal(z, 1.0), D.AffineTransform(z.detach(), 1.0))
        return z.square().mean(), shifted

    before = flatten(model.parameters())
    with pytest.raises(NotImplementedError, match=f"AffineTransform.*changes.*{FORM_C}"):
        NaturalCG(model.parameters()).step(closure)
    assert torch.equal(flatten(model.parameters()), before)


class Policy:
    """A categorical policy with sampled actions."""

    def __init__(self, samples=200, dtype=torch.float64):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
        self.x = torch.randn(samples, 4, dtype=dtype)
        self.logits = self.model(self.x).detach()
        self.old = D.Categorical(logits=self.logits)
        self.actions = self.old.sample()
        self.before = self.old.log_prob(self.actions)
        self.advantages = torch.randn(samples, dtype=dtype)

    @property
    def new(self):
        return D.Categorical(logits=self.model(self.x))

    @property
    def log_ratio(self):
        return self.new.log_prob(self.actions) - self.before

    def step(self, kl, **settings):
        optimizer = NaturalCG(self.model.parameters(), **settings)
        optimizer.step(lambda: (-(self.log_ratio.exp() * self.advantages).mean(), kl(self)))
        return optimizer.last_step

    def loss_far_below(self):
        """A loss that is not a KL, however small it is."""
        return 1e-6 * F.cross_entropy(self.model(self.x), self.actions)


NO_KL = {
    "k1": (lambda p: -p.log_ratio.mean(), "must have zero gradient"),
    "k1, the other way round": (lambda p: p.log_ratio.mean(), "must have zero gradient"),
    "the ratio": (lambda p: (p.log_ratio.exp() - 1).mean(), "must have zero gradient"),
    "k1 of the first sample": (lambda p: -p.log_ratio[0], "must have zero gradient"),
    "a linear function": (
        lambda p: 1e-3 * sum((q - q.detach()).sum() for q in p.model.parameters()),
        "must have zero gradient",
    ),
    "a loss": (lambda p: F.cross_entropy(p.model(p.x), p.actions), "must be zero"),
    "a small loss": (Policy.loss_far_below, "must be zero"),
    "the KL from another prediction": (
        lambda p: D.kl_divergence(D.Categorical(logits=p.old.logits + 0.01 * p.x), p.new).mean(),
        "must be zero",
    ),
}


@pytest.mark.parametrize("use", ["step", "list"])
@pytest.mark.parametrize("name", NO_KL)
def test_what_is_no_kl_is_refused(name, use):
    kl, message = NO_KL[name]
    policy = Policy()
    before = flatten(policy.model.parameters())
    optimizer = NaturalCG(policy.model.parameters(), max_kl=0.01)

    def closure():
        return -(policy.log_ratio.exp() * policy.advantages).mean(), kl(policy)

    with pytest.raises(ValueError, match=f"{message} .*detached copy of the current prediction"):
        optimizer.step(closure if use == "step" else [closure, closure])
    assert torch.equal(flatten(policy.model.parameters()), before)
    assert optimizer.last_step is None


KL = {
    "of distributions": lambda p: D.kl_divergence(p.old, p.new).mean(),
    "the other way round": lambda p: D.kl_divergence(p.new, p.old).mean(),
    "k2": lambda p: p.log_ratio.square().mean() / 2,
    "k3": lambda p: (p.log_ratio.exp() - 1 - p.log_ratio).mean(),
    "squared distance": lambda p: (p.model(p.x) - p.logits).square().mean(),
    "from an old prediction in float32": lambda p: D.kl_divergence(
        D.Categorical(logits=p.old.logits.float().to(p.x.dtype)), p.new
    ).mean(),
}


@pytest.mark.parametrize("samples", [20, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", KL)
def test_a_kl_is_taken(name, dtype, samples):
    report = Policy(samples, dtype).step(KL[name], max_kl=0.1)
    assert report.curvature == "fisher"
    assert report.kl >= 0
    assert report.accepted or dtype == torch.bfloat16


def test_k1_is_refused_in_float32_and_of_many_samples():
    with pytest.raises(ValueError, match="must have zero gradient"):
        Policy(20_000, torch.float32).step(lambda p: -p.log_ratio.mean())


@pytest.mark.parametrize(("max_backtracks", "accepted"), [(1, False), (30, True)])
@pytest.mark.parametrize("trust_region", ["clip", "boundary"])
def test_a_measured_kl_that_is_negative_is_turned_down(max_backtracks, accepted, trust_region):
    """``½ w² + 10 w³`` is zero with zero gradient at 0, has a Hessian, and is negative below −0.05."""
    w = nn.Parameter(torch.zeros((), dtype=torch.float64))
    settings = {"max_kl": 0.01, "trust_region": trust_region, "max_backtracks": max_backtracks}
    optimizer = NaturalCG([w], **settings)
    optimizer.step(lambda: (w * 1.0, w.square() / 2 + 10 * w.pow(3)))
    report = optimizer.last_step
    assert report.accepted is accepted
    assert report.kl >= 0
    assert report.backtracks > 0
    assert accepted or "and a KL is never negative: return another" in report.reason


def test_rounding_below_zero_is_no_kl_below_zero():
    model, x = make_model("linear", 2)
    start = model(x).detach()

    def closure():
        z = model(x)
        kl = (z - start).square().mean()
        return z.square().mean(), kl - (1e-12 + kl.detach() if (z != start).any() else 0.0)

    optimizer = NaturalCG(model.parameters(), max_kl=0.1)
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    assert math.copysign(1, optimizer.last_step.kl) == 1


def test_a_prediction_that_is_detached_in_the_closure_stays_where_it_was():
    """A closure that compares the prediction with itself gives the KL from the prediction before the step."""
    model, x = make_model("linear", 2)
    before = D.Normal(model(x).detach(), 1.0)

    def closure():
        z = model(x)
        return z.square().mean(), D.kl_divergence(
            D.Normal(z.detach(), 1.0), D.Normal(z, 1.0)
        ).mean()

    optimizer = NaturalCG(model.parameters())
    optimizer.step(closure)
    true = D.kl_divergence(before, D.Normal(model(x), 1.0)).mean().item()
    assert optimizer.last_step.kl == pytest.approx(true)
    assert 0 < true <= 0.01
