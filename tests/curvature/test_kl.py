"""What the closure may return as a metric, and how the KL to it is measured."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import (
    FAMILIES,
    assert_near,
    dense_gauss_newton,
    flat_function,
    flatten,
    heads,
    make_model,
    mean_kl,
    negative_log_likelihood,
)
from torch import distributions as D

from ngd_optim import NaturalCG, linearize
from ngd_optim.curvature import kl as distributions

FAR = 0.3
SYMMETRIC = {"normal_fixed_scale", "cauchy"}


@pytest.mark.parametrize("name", FAMILIES)
def test_kl_is_measured_from_the_old_to_the_new_prediction(name):
    family = FAMILIES[name]
    model, x = make_model("mlp", family.size)
    old = family.predict(model(x).detach())
    data = [head.sample() for head in heads(old)]

    def closure():
        prediction = family.predict(model(x))
        return negative_log_likelihood(prediction, data), prediction

    optimizer = NaturalCG(
        model.parameters(), max_kl=FAR, trust_region="boundary", damping=0.1, max_backtracks=0
    )
    optimizer.step(closure)
    report = optimizer.last_step
    assert report.accepted
    new = family.predict(model(x).detach())
    assert report.kl == pytest.approx(mean_kl(old, new).item(), rel=1e-8)
    if name not in SYMMETRIC:
        assert report.kl != pytest.approx(mean_kl(new, old).item(), rel=1e-4)


def mixture(z):
    return D.MixtureSameFamily(D.Categorical(logits=z), D.Normal(z, 1.0))


WITHOUT_KL = {
    "MixtureSameFamily": mixture,
    "StudentT": lambda z: D.StudentT(z.exp() + 1),
    "VonMises": lambda z: D.VonMises(z, 1.0),
    "NegativeBinomial": lambda z: D.NegativeBinomial(3, logits=z),
    "Multinomial": lambda z: D.Multinomial(3, logits=z),
    "RelaxedBernoulli": lambda z: D.RelaxedBernoulli(torch.ones(()), logits=z),
    "LKJCholesky": lambda z: D.LKJCholesky(2, z.exp()),
    "Uniform": lambda z: D.Uniform(z, z + 1),
    "Pareto": lambda z: D.Pareto(z.exp(), 2.0),
    "AffineTransform": lambda z: D.TransformedDistribution(
        D.Normal(torch.zeros_like(z), 1.0), D.AffineTransform(z, 2.0)
    ),
}


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: [d], lambda d: {"a": d}, lambda d: D.Independent(d, 0)]
)
@pytest.mark.parametrize("name", WITHOUT_KL)
def test_without_a_kl_the_message_names_form_c(name, wrap):
    model, x = make_model("linear", 2)
    with pytest.raises(
        NotImplementedError, match=rf"({name}|Independent).*\(loss, kl\).*closure form \(c\)"
    ):
        linearize(lambda: (model(x).sum(), wrap(WITHOUT_KL[name](model(x)))), model.parameters())


@pytest.mark.parametrize("name", WITHOUT_KL)
def test_gauss_newton_needs_no_kl(name):
    model, x = make_model("linear", 2)

    def loss(z):
        return F.mse_loss(z, torch.ones_like(z))

    point = linearize(
        lambda: (loss(model(x)), WITHOUT_KL[name](model(x))), model.parameters(), curvature="ggn"
    )
    v = torch.randn(8, dtype=torch.float64)
    dense = dense_gauss_newton(flat_function(model, x), flatten(model.parameters()), loss)
    assert_near(point.curvature(v), dense @ v)


@pytest.mark.parametrize("metric", ["nats", [1.0], {"a": None}, 0.5])
def test_other_metrics_are_refused(metric):
    model, x = make_model("linear", 2)
    with pytest.raises(
        TypeError, match=r"must be a torch.distributions.Distribution, a list, tuple or dict"
    ):
        linearize(lambda: (model(x).sum(), metric), model.parameters())


def detached_head(z):
    return [D.Normal(z, 1.0), D.Normal(z.detach(), 1.0)]


@pytest.mark.parametrize("predict", [lambda z: D.Categorical(logits=z.detach()), detached_head])
def test_detached_distributions_are_refused(predict):
    model, x = make_model("linear", 2)
    with pytest.raises(
        ValueError, match=r"parameters of the returned \w+ are detached from the graph"
    ):
        linearize(lambda: (model(x).sum(), predict(model(x))), model.parameters())


def test_a_kl_must_be_a_scalar_zero_with_a_graph():
    model, x = make_model("linear", 2)
    for metric, message in [
        (lambda: model(x) * 0, r"must be a scalar KL, got shape \(5, 2\)"),
        (lambda: model(x).sum().detach() * 0, "kl has no graph to differentiate"),
        (lambda: model(x).square().sum(), "kl must be zero at the current parameters, got "),
    ]:
        with pytest.raises(ValueError, match=message):
            linearize(lambda: (model(x).sum(), metric()), model.parameters())  # noqa: B023


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: [D.ComposeTransform([t])], lambda t: [t.inv]]
)
def test_learned_transforms_are_refused_however_deep(wrap):
    loc = torch.nn.Parameter(torch.zeros(2))
    wrapped = wrap(D.AffineTransform(loc, 1.0))
    base = D.Normal(torch.zeros(2, requires_grad=True), torch.ones(2))
    with pytest.raises(NotImplementedError, match="learned parameters"):
        NaturalCG([loc]).step(lambda: (loc.sum(), D.TransformedDistribution(base, wrapped)))


CONFIDENT = [
    lambda z: D.Categorical(logits=z),
    lambda z: D.OneHotCategorical(logits=z),
    lambda z: D.Bernoulli(logits=z),
    lambda z: D.Independent(D.Bernoulli(logits=z), 1),
]


@pytest.mark.parametrize("make", CONFIDENT)
def test_the_kl_of_confident_predictions_is_that_of_float64(make):
    """A probability that underflows is not a prediction of the impossible."""
    z = torch.tensor([[0.0, -110.0, 3.0], [2.0, -80.0, -120.0]], dtype=torch.float64)
    other = z + torch.tensor([[0.1, -5.0, 0.0], [0.0, -40.0, 9.0]], dtype=torch.float64)
    expected = D.kl_divergence(make(z), make(other)).mean()
    single = distributions.mean_kl(make(z.float()), make(other.float()))
    assert single.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    assert distributions.mean_kl(make(z), make(other)).item() == pytest.approx(
        expected.item(), rel=1e-12
    )


def test_what_is_masked_in_both_has_no_part_in_the_kl():
    z = torch.tensor([[0.0, -math.inf, 1.0]], dtype=torch.float64)
    other = z.clone().requires_grad_()
    distributions.mean_kl(D.Categorical(logits=z), D.Categorical(logits=other)).backward()
    assert other.grad is not None
    assert other.grad.isfinite().all()
    impossible = D.Categorical(logits=torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64))
    assert distributions.mean_kl(D.Categorical(logits=z), impossible).item() == math.inf
