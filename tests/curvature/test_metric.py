"""Gradients and curvature products against dense matrices."""

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import (
    BATCH,
    FAMILIES,
    assert_near,
    dense_fisher,
    dense_gauss_newton,
    flat_function,
    flatten,
    heads,
    make_model,
    mean_kl,
    negative_log_likelihood,
)
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.func import hessian, jacrev

from ngd_optim import linearize

MODELS = ["linear", "mlp", "conv"]
# Here autograd takes the second derivative of torch's KL for zero, at the kink of |loc − loc'|.
KINKED = {name for name in FAMILIES if "laplace" in name}


def assert_products(point, dense, rtol=1e-8):
    for v in torch.randn(2, len(dense), dtype=dense.dtype):
        assert_near(point.curvature(v), dense @ v, rtol)


def fisher_problem(family, model_kind):
    model, x = make_model(model_kind, family.size)
    with torch.no_grad():
        data = [head.sample() for head in heads(family.predict(model(x)))]

    def closure():
        prediction = family.predict(model(x))
        return negative_log_likelihood(prediction, data), prediction

    return model, closure, flat_function(model, x), flatten(model.parameters())


@pytest.mark.parametrize("model_kind", MODELS)
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - KINKED))
def test_fisher_product_is_the_hessian_of_the_kl(name, model_kind):
    family = FAMILIES[name]
    model, closure, output, theta = fisher_problem(family, model_kind)
    point = linearize(closure, model.parameters())
    assert_near(
        point.gradient, flatten(torch.autograd.grad(closure()[0], list(model.parameters())))
    )
    torch.testing.assert_close(point.loss, closure()[0].detach(), rtol=1e-12, atol=0)
    assert_products(point, dense_fisher(output, theta, family.predict))


@pytest.mark.parametrize("model_kind", MODELS)
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.information])
def test_fisher_product_is_the_textbook_one(name, model_kind):
    family = FAMILIES[name]
    model, closure, output, theta = fisher_problem(family, model_kind)
    rows = family.coordinates(output(theta))
    J = jacrev(lambda t: family.coordinates(output(t)))(theta)
    information = torch.stack([family.information(row) for row in rows])
    dense = torch.einsum("ijp,ijk,ikq->pq", J, information, J) / len(rows)
    assert_products(linearize(closure, model.parameters()), dense)


def test_masked_actions_have_no_curvature():
    model, x = make_model("mlp", 4)
    allowed = torch.rand(BATCH, 4) < 0.6
    allowed[:, 0] = True

    def masked(z):
        return Categorical(logits=z.masked_fill(~allowed, -torch.inf))

    action = masked(model(x)).sample()

    def closure():
        policy = masked(model(x))
        return -policy.log_prob(action).mean(), policy

    def dense_kl(t):
        old, new = (
            z.masked_fill(~allowed, -1e9).log_softmax(-1) for z in (output(theta), output(t))
        )
        return (old.exp() * (old - new)).sum(-1).mean()

    output, theta = flat_function(model, x), flatten(model.parameters())
    assert_products(linearize(closure, model.parameters()), hessian(dense_kl)(theta))


def test_scale_that_is_a_parameter_of_its_own():
    model, x = make_model("mlp", 2)
    log_scale = nn.Parameter(torch.tensor([0.1, -0.3], dtype=torch.float64))
    data = torch.randn(BATCH, 2, dtype=torch.float64)

    def closure():
        policy = Normal(model(x), log_scale.exp())
        return -policy.log_prob(data).mean(), policy

    output, theta = flat_function(model, x), flatten([*model.parameters(), log_scale])

    def dense_kl(t):
        old, new = (Normal(output(t[:-2]), t[-2:].exp(), validate_args=False) for t in (theta, t))
        return kl_divergence(old, new).mean()

    assert_products(linearize(closure, [*model.parameters(), log_scale]), hessian(dense_kl)(theta))


labels = torch.tensor([0, 2, 1, 2, 0])
near = torch.linspace(-1, 1, 3 * BATCH, dtype=torch.float64).view(BATCH, 3)
shares = near.softmax(-1)
weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

# Functions of the model's output z.
LOSSES = {
    "cross_entropy": lambda z: F.cross_entropy(z, labels),
    "cross_entropy_sum": lambda z: F.cross_entropy(z, labels, reduction="sum"),
    "cross_entropy_by_keyword": lambda z: F.cross_entropy(input=z, target=labels),
    "cross_entropy_smoothed": lambda z: F.cross_entropy(z, labels, label_smoothing=0.2),
    "cross_entropy_weighted": lambda z: F.cross_entropy(z, labels, weight=weight),
    "cross_entropy_ignoring": lambda z: F.cross_entropy(z, labels, ignore_index=2),
    "cross_entropy_soft": lambda z: F.cross_entropy(z, shares),
    "cross_entropy_per_sample": lambda z: (
        F.cross_entropy(z, labels, reduction="none") * near[:, 2] ** 2
    ).sum(),
    "cross_entropy_module": lambda z: nn.CrossEntropyLoss(weight, label_smoothing=0.1)(z, labels),
    "mse": lambda z: F.mse_loss(z, near),
    "mse_sum": lambda z: F.mse_loss(z, near, reduction="sum"),
    "mse_swapped": lambda z: F.mse_loss(near, z),
    "mse_weighted": lambda z: F.mse_loss(z, near, weight=shares.expand_as(z)),
    "mse_module": lambda z: nn.MSELoss(reduction="sum")(z, near),
    "mse_of_two_outputs": lambda z: F.mse_loss(z[:, :1], z[:, 1:2]),
    "mse_root": lambda z: F.mse_loss(z, near).sqrt(),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, shares),
    "bce_sum": lambda z: F.binary_cross_entropy_with_logits(z, shares, reduction="sum"),
    "bce_weighted": lambda z: F.binary_cross_entropy_with_logits(
        z, shares, weight, pos_weight=1 / weight
    ),
    "bce_module": lambda z: nn.BCEWithLogitsLoss(weight, pos_weight=1 / weight)(z, shares),
    "several": lambda z: (
        F.cross_entropy(z, labels) + 0.3 * F.mse_loss(z[:, :2], near[:, 1:]) - z.new_ones(())
    ),
    "product": lambda z: F.cross_entropy(z, labels) * F.mse_loss(z, near),
}


@pytest.mark.parametrize("model_kind", MODELS)
@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_product(name, model_kind):
    model, x = make_model(model_kind, 3)
    loss = LOSSES[name]

    def closure():
        return loss(model(x))

    output, theta = flat_function(model, x), flatten(model.parameters())
    point = linearize(closure, model.parameters())
    assert_near(point.gradient, flatten(torch.autograd.grad(closure(), list(model.parameters()))))
    assert_products(point, dense_gauss_newton(output, theta, loss))


def test_unknown_curvature():
    model, x = make_model("linear", 3)
    with pytest.raises(ValueError, match=r"curvature must be one of .*got 'natural'"):
        linearize(lambda: F.mse_loss(model(x), near), model.parameters(), curvature="natural")


def test_nonlinear_features_of_one_model_output():
    model, x = make_model("mlp", 3)
    z = flat_function(model, x)

    def output(t):
        return torch.cat([z(t)[:, :1].tanh(), z(t)[:, 1:]], -1)

    def loss(z):
        return F.mse_loss(z[:, :1], z[:, 1:2]) + F.mse_loss(z[:, 2:], near[:, 2:])

    theta = flatten(model.parameters())

    def closure():
        z = model(x)
        return F.mse_loss(z[:, :1].tanh(), z[:, 1:2]) + F.mse_loss(z[:, 2:], near[:, 2:])

    assert_products(linearize(closure, model.parameters()), dense_gauss_newton(output, theta, loss))


def test_curvature_chooses_the_metric():
    model, x = make_model("mlp", 3)

    def closure():
        z = model(x)
        return F.mse_loss(z, near), Categorical(logits=z)

    output, theta = flat_function(model, x), flatten(model.parameters())
    fisher = dense_fisher(output, theta, FAMILIES["categorical_logits"].predict)
    assert_products(linearize(closure, model.parameters()), fisher)
    assert_products(linearize(closure, model.parameters(), curvature="fisher"), fisher)
    ggn = dense_gauss_newton(output, theta, LOSSES["mse"])
    assert_products(linearize(closure, model.parameters(), curvature="ggn"), ggn)


@pytest.mark.parametrize("model_kind", MODELS)
def test_product_of_a_returned_kl(model_kind):
    model, x = make_model(model_kind, 4)
    predict = FAMILIES["normal"].predict
    old = predict(model(x).detach())

    def closure():
        return model(x).square().mean(), mean_kl(old, predict(model(x)))

    output, theta = flat_function(model, x), flatten(model.parameters())
    point = linearize(closure, model.parameters())
    assert_near(
        point.gradient, flatten(torch.autograd.grad(closure()[0], list(model.parameters())))
    )
    assert_products(point, dense_fisher(output, theta, predict))


@pytest.mark.parametrize(
    "backward",
    [
        torch.Tensor.backward,
        pytest.param(
            torch.autograd.backward,
            marks=pytest.mark.skipif(
                "has_torch_function" not in torch.autograd.backward.__code__.co_names,
                reason="this torch shows modes only the method",
            ),
        ),
    ],
)
def test_closure_that_calls_backward_and_returns_a_number(backward):
    model, x = make_model("mlp", 3)

    def closure():
        loss = LOSSES["several"](model(x))
        backward(loss)
        return loss.item()

    output, theta = flat_function(model, x), flatten(model.parameters())
    point = linearize(closure, model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert_near(
        point.gradient,
        flatten(torch.autograd.grad(LOSSES["several"](model(x)), list(model.parameters()))),
    )
    assert_products(point, dense_gauss_newton(output, theta, LOSSES["several"]))


def test_several_backward_calls_add_up():
    model, x = make_model("mlp", 3)

    def closure():
        z = model(x)
        F.cross_entropy(z, labels).backward(retain_graph=True)
        (0.3 * F.mse_loss(z[:, :2], near[:, 1:])).backward()
        return z.new_zeros(())

    output, theta = flat_function(model, x), flatten(model.parameters())
    point = linearize(closure, model.parameters())
    torch.testing.assert_close(
        point.loss, LOSSES["several"](model(x)).detach() + 1, rtol=1e-12, atol=0
    )
    assert_products(point, dense_gauss_newton(output, theta, LOSSES["several"]))


def test_order_of_the_parameters_is_that_of_the_list_without_frozen_ones():
    model, x = make_model("mlp", 3)

    def closure():
        return F.mse_loss(model(x), near)

    last, first = model[2].weight, model[0].weight
    model[0].bias.requires_grad_(False)
    point = linearize(closure, [last, model[0].bias, first])
    assert_near(point.gradient, flatten(torch.autograd.grad(closure(), [last, first])))
    output, theta = flat_function(model, x), flatten(model.parameters())
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    index = [
        i for wanted in ("2.weight", "0.weight") for i, name in enumerate(names) if name == wanted
    ]
    assert_products(point, dense_gauss_newton(output, theta, LOSSES["mse"])[index][:, index])


def test_parameters_without_effect_have_no_gradient_and_no_curvature():
    model, x = make_model("mlp", 3)
    idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    point = linearize(lambda: F.mse_loss(model(x), near), [idle, *model.parameters()])
    assert point._point.reached == point._point.used == [False, True, True, True, True]
    assert not point.gradient[:2].any()
    v = torch.randn_like(point.gradient)
    assert not point.curvature(v)[:2].any()
    assert_near(
        point.curvature(v)[2:],
        linearize(lambda: F.mse_loss(model(x), near), model.parameters()).curvature(v[2:]),
    )


@pytest.mark.parametrize("form", ["fisher", "ggn", "kl"])
def test_symmetric_and_positive_semidefinite(form):
    model, x = make_model("mlp", 3)
    old = Categorical(logits=model(x).detach())

    def closure():
        policy = Categorical(logits=model(x))
        metric = {"fisher": policy, "ggn": None, "kl": kl_divergence(old, policy).mean()}[form]
        return F.cross_entropy(model(x), labels), metric

    point = linearize(closure, model.parameters())
    F_dense = torch.stack(
        [point.curvature(e) for e in torch.eye(len(point.gradient), dtype=torch.float64)]
    )
    torch.testing.assert_close(F_dense, F_dense.T, rtol=1e-10, atol=1e-14)
    assert torch.linalg.eigvalsh(F_dense).min() > -1e-14
    assert torch.linalg.eigvalsh(F_dense).max() > 1e-3


def test_float32_agrees_with_float64():
    model, x = make_model("mlp", 3)
    wide = linearize(lambda: F.cross_entropy(model(x), labels), model.parameters())
    v = torch.randn_like(wide.gradient)
    true = wide.curvature(v)
    model, x = model.float(), x.float()
    narrow = linearize(lambda: F.cross_entropy(model(x), labels), model.parameters())
    assert narrow.gradient.dtype == torch.float32
    assert_near(narrow.gradient.double(), wide.gradient, 1e-5)
    assert_near(narrow.curvature(v).double(), true, 1e-5)


def test_product_refuses_a_vector_of_another_shape():
    model, x = make_model("linear", 3)
    point = linearize(lambda: F.mse_loss(model(x), near), model.parameters())
    with pytest.raises(ValueError, match=r"v must have shape \(12,\) or \(12, k\), got \(11,\)"):
        point.curvature(torch.zeros(11, dtype=torch.float64))
