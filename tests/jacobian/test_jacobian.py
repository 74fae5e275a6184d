"""The Jacobian, against rows by autograd one at a time, and by which way its rows were found."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import assert_near
from torch import nn
from torch.func import functional_call, hessian, vmap
from torch.nn.utils import parametrizations

from ngd_optim.jacobian.jacobian import compute_cheap_jacobian, jacobian
from ngd_optim.parameters import FlatParameters

N = 40
torch.manual_seed(0)
X = torch.rand(N, 2, dtype=torch.float64)
EDGE = torch.rand(35, 2, dtype=torch.float64)
SEQUENCES = torch.randn(N, 5, 4, dtype=torch.float64)
IMAGES = torch.randn(N, 4, 7, 8, dtype=torch.float64)
WORDS = torch.randint(0, 6, (N, 5))
T = torch.linspace(0, 2, N, dtype=torch.float64)


def tanh_net(outputs=1):
    layers = nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)
    return nn.Sequential(*layers)


def laplacian_by_autograd(net):
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    seconds = (
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    )
    return sum(seconds)


def one_second_derivative(net):
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return slope[:, 0] - torch.autograd.grad(slope[:, 1].sum(), x, create_graph=True)[0][:, 1]


def laplacian_by_torch_func(net):
    return vmap(lambda x: hessian(lambda y: net(y).squeeze())(x).trace())(X)


def called_functionally(net):
    params = dict(net.named_parameters())
    return [vmap(lambda x: functional_call(net, params, (x,)))(X)]


def concatenated(net):
    return [torch.cat([laplacian_by_autograd(net), net(EDGE).squeeze(-1)])]


def both_ends(net):
    u = net(torch.cat([X, EDGE]))
    return [u[:N], u[N:]]


class Weights(nn.Module):
    """Plain parameters of some shapes, ``w0``, ``w1`` and so on."""

    def __init__(self, *shapes):
        super().__init__()
        for i, shape in enumerate(shapes):
            setattr(self, f"w{i}", nn.Parameter(torch.randn(shape) / 2))


class Attention(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.batch_dim = 0 if batch_first else 1

    def forward(self, x):
        x = x.movedim(0, self.batch_dim)
        attended = self.norm(x + self.attention(x, x, x)[0])
        return self.head(attended).mean(1 - self.batch_dim)


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(6, 3, **options)
        self.head = nn.Linear(3, 2)

    def forward(self, words):
        return self.head(self.embedding(words).tanh().sum(1))


class Cells(nn.Module):
    """A recurrent cell over a sequence, with an output for each of its steps."""

    def __init__(self, time_first=False):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(4, 3), nn.Linear(3, 1)
        self.dim = 0 if time_first else 1

    def forward(self, x):
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(self.head(state[0]))
        return torch.stack(outputs, self.dim).squeeze(-1)


class OneVector(nn.Module):
    """A network with all weights in one vector."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(2 * 5 + 5 + 5))

    def forward(self, x):
        a, b, c = self.theta.split([10, 5, 5])
        return (x @ a.view(2, 5) + b).tanh() @ c


class Scaled(torch.autograd.Function):
    """``x * scale``, with a derivative of its own."""

    @staticmethod
    def forward(x, scale):
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        return gradient * scale, (gradient * x).sum(0)


class ScaledByNumpy(Scaled):
    """The same, where torch.vmap cannot follow."""

    @staticmethod
    def backward(ctx, gradient):
        x, scale = (t.detach().numpy() for t in ctx.saved_tensors)
        g = gradient.numpy()
        return torch.from_numpy(g * scale), torch.from_numpy((g * x).sum(0))


def convolution(**options):
    return nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))


def permuted(net):
    """Samples come twice, and outputs in another order."""
    generator = torch.Generator().manual_seed(1)
    return [
        net(X[torch.randint(N, (N,), generator=generator)])[torch.randperm(N, generator=generator)]
    ]


def used_twice(net):
    """A sample's output is in two residuals, so that its gradient does not tell them apart."""
    return [net(X)[torch.cat([torch.arange(N), torch.arange(7)])]]


def compared(net):
    u = net(X)
    return [u[: N // 2] - u[N // 2 :]]


def without_mean(net):
    u = net(X)
    return [u - u.mean(0)]


def tied(m):
    return [(X @ m.w0.T).tanh() @ m.w0 + m.w1]


# Name: model, its outputs, and the parameters that are pulled back row by row: their number, or all.
CASES = {
    "plain": (tanh_net, lambda m: [m(X)], 0),
    "flat": (tanh_net, lambda m: [m(X).squeeze(-1)], 0),
    "several per sample": (lambda: tanh_net(3), lambda m: [m(X)], 0),
    "laplacian by autograd": (tanh_net, lambda m: [laplacian_by_autograd(m), m(EDGE)], 0),
    "laplacian by torch.func": (tanh_net, lambda m: [laplacian_by_torch_func(m), m(EDGE)], 0),
    "one derivative of several": (tanh_net, lambda m: [one_second_derivative(m), m(EDGE)], 0),
    "functional call": (tanh_net, called_functionally, 0),
    "one batch, two residuals": (tanh_net, both_ends, 0),
    "two residuals and a number": (tanh_net, lambda m: [*both_ends(m), m(X).mean()], 0),
    "concatenated": (tanh_net, concatenated, 0),
    "concatenated with nothing": (tanh_net, lambda m: [torch.cat([m(X), m(X[:0])])], 0),
    "a sample in two rows": (tanh_net, lambda m: [m(X) - m(X.flip(0) + 1.0)], 0),
    "rows of one batch compared": (tanh_net, compared, 0),
    "permuted and repeated": (tanh_net, permuted, 0),
    "one output in two residuals": (tanh_net, used_twice, "all"),
    "only one in two residuals": (tanh_net, lambda m: [m(X)[[*range(N), 3]]], "all"),
    "equal samples": (tanh_net, lambda m: [m(X[:1].expand(N, 2))], 0),
    "samples without a gradient": (tanh_net, lambda m: [m(X) * (T > 1).unsqueeze(1)], 0),
    "dead units": (
        lambda: nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)),
        lambda m: [m(X - 1)],
        0,
    ),
    "a grid": (tanh_net, lambda m: [m(X).view(5, 8)], 0),
    "parts of sequences": (tanh_net, lambda m: [m(X.view(20, 2, 2)).sum((1, 2)), m(X)[:33]], 0),
    "outputs along sequences": (lambda: nn.Linear(4, 3), lambda m: [m(SEQUENCES).tanh()], 0),
    "sums of sequences": (lambda: nn.Linear(4, 3), lambda m: [m(SEQUENCES).tanh().sum(1)], 0),
    "a layer used by half": (lambda: nn.Linear(2, 7), lambda m: [m(X)[:, :6]], 0),
    "convolution": (convolution, lambda m: [m(IMAGES)], 0),
    "with groups": (
        lambda: convolution(groups=2, stride=2, padding=(2, 1)),
        lambda m: [m(IMAGES)],
        0,
    ),
    "dilated": (lambda: convolution(dilation=2, bias=False), lambda m: [m(IMAGES)], 0),
    "depthwise in 1d": (
        lambda: nn.Conv1d(5, 5, 2, groups=5),
        lambda m: [m(SEQUENCES).sum((1, 2))],
        0,
    ),
    "transposed convolution": (
        lambda: nn.ConvTranspose1d(5, 2, 2),
        lambda m: [m(SEQUENCES)[:, :, 0]],
        1,
    ),
    "attention": (Attention, lambda m: [m(SEQUENCES)], 2),
    "attention, time first": (lambda: Attention(batch_first=False), lambda m: [m(SEQUENCES)], 2),
    "recurrent cell": (Cells, lambda m: [m(SEQUENCES)], 0),
    "recurrent cell, last output": (Cells, lambda m: [m(SEQUENCES)[:, -1]], 0),
    "recurrent cell, time first": (lambda: Cells(time_first=True), lambda m: [m(SEQUENCES)], 4),
    "as many steps as sequences": (
        lambda: Cells(time_first=True),
        lambda m: [m(IMAGES[:7, :, :, 0].mT)],
        4,
    ),
    "embedding": (Words, lambda m: [m(WORDS)], 1),
    "embedding with padding": (lambda: Words(padding_idx=2), lambda m: [m(WORDS)], 1),
    "group norm": (
        lambda: nn.Sequential(nn.Linear(2, 6), nn.GroupNorm(2, 6), nn.Linear(6, 1)),
        lambda m: [m(X)],
        2,
    ),
    "tied weights": (lambda: Weights((5, 2), (2,)), tied, 0),
    "x @ W, with a plain bias": (
        lambda: Weights((2, 5), (5,), (5,)),
        lambda m: [(X @ m.w0 + m.w1).tanh() @ m.w2],
        0,
    ),
    "W @ x": (lambda: Weights((5, 2), (3, 5)), lambda m: [m.w1 @ (m.w0 @ X.T).tanh()], "all"),
    "einsum by heads": (
        lambda: Weights((3, 2, 4)),
        lambda m: [torch.einsum("ni,hio->nho", X, m.w0).tanh().sum((1, 2))],
        0,
    ),
    "baddbmm": (
        lambda: Weights((3, 4, 2), (3, 1, 2)),
        lambda m: [torch.baddbmm(m.w1, SEQUENCES[:, :3].movedim(1, 0), m.w0).tanh().sum(0)],
        0,
    ),
    "addmm with factors": (
        lambda: Weights((2, 3), (3,)),
        lambda m: [torch.addmm(m.w1, X, m.w0, beta=0.5, alpha=2.0)],
        "all",
    ),
    "unknown coefficient": (
        lambda: nn.ModuleList([tanh_net(), Weights(())]),
        lambda m: [
            one_second_derivative(m[0]) + m[1].w0.exp() * laplacian_by_autograd(m[0]),
            m[0](EDGE),
        ],
        0,
    ),
    "scales and shifts": (
        lambda: Weights((1,), (2,), (1, 2), ()),
        lambda m: [(X / m.w1.exp() - m.w0) * m.w2 + m.w3**2 / (1 + X)],
        0,
    ),
    "regression": (lambda: Weights((3,)), lambda m: [m.w0[0] * (-m.w0[1] * T).exp() + m.w0[2]], 0),
    "one vector": (OneVector, lambda m: [m(X)], 0),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(2, 3)),
        lambda m: [m(X).tanh()],
        0,
    ),
    "masked and low-rank": (
        lambda: Weights((2, 3), (2, 1), (1, 3)),
        lambda m: [X @ (m.w0 * torch.ones(2, 3, dtype=torch.float64).tril() + m.w1 @ m.w2)],
        0,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Linear(6, 1)),
        lambda m: [m(X)],
        2,
    ),
    "residual per parameter": (lambda: Weights((N,)), lambda m: [m.w0.sin() * T], "all"),
    "a parameter as output": (
        lambda: nn.ModuleList([tanh_net(), Weights((33,))]),
        lambda m: [m[0](X), m[1].w0],
        "all",  # by that output
    ),
    "unused and empty": (
        lambda: nn.ModuleList([tanh_net(), Weights((3,), (0, 2))]),
        lambda m: [m[0](X), m[0](X[:0])],
        0,
    ),
    "index": (lambda: Weights((6,), (2,)), lambda m: [m.w0[WORDS[:, 0]] * (X @ m.w1).tanh()], 1),
    "a function of its own": (
        lambda: Weights((2, 5), (5,)),
        lambda m: [Scaled.apply(X @ m.w0, m.w1)],
        1,
    ),
    "the same for a weight": (
        lambda: Weights((2, 5), (5,)),
        lambda m: [X @ Scaled.apply(m.w0, m.w1)],
        0,
    ),
    "the same by numpy": (
        lambda: Weights((2, 5), (5,)),
        lambda m: [X @ ScaledByNumpy.apply(m.w0, m.w1)],
        0,
    ),
    "one token more": (
        lambda: Weights((4,), (4, 3)),
        lambda m: [(torch.cat([SEQUENCES, m.w0.expand(N, 1, 4)], 1) @ m.w1).tanh().sum(1)],
        0,
    ),
    "batch norm": (lambda: nn.Sequential(tanh_net(2), nn.BatchNorm1d(2)), lambda m: [m(X)], "most"),
    "mean over the batch": (tanh_net, without_mean, "most"),
}


def dense_rows(outputs, parameters):
    params = parameters.tensors
    flat = torch.cat([z.reshape(-1) for z in outputs])
    rows = (torch.autograd.grad(z, params, retain_graph=True, allow_unused=True) for z in flat)
    return torch.stack([parameters.flatten(row) for row in rows])


def model_of(make):
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


def outputs_and_parameters(case, dtype=torch.float64):
    make, outputs_of, by_rows = CASES[case]
    model = model_of(make)
    outputs = outputs_of(model.to(dtype))  # lazy layers get their weights
    params = list(model.parameters())
    count = {"all": len(params), "most": len(params) - 1}.get(by_rows, by_rows)
    return outputs, FlatParameters([{"params": params}]), count


def pulled_by_rows(caplog):
    """How many parameters were pulled back row by row, by what the log says."""
    found = re.findall(r"row by row for (\d+) of", caplog.text)
    return int(found[0]) if found else 0


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_single_pull_backs(case, caplog):
    outputs, parameters, by_rows = outputs_and_parameters(case)
    caplog.set_level("INFO", "ngd_optim")
    assert_near(jacobian(outputs, parameters), dense_rows(outputs, parameters), 1e-12)
    if case in ("batch norm", "mean over the batch"):
        assert pulled_by_rows(caplog) >= by_rows  # a bias before a mean has no gradient at all
    else:
        assert pulled_by_rows(caplog) == by_rows


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("plain", 2),
        ("laplacian by autograd", 4),  # two for each output
        ("concatenated", 2),
        ("permuted and repeated", 3),  # the check needs other weights
        ("several per sample", 2 + 2 + 3),  # two layouts, three components
    ],
)
def test_the_gradient_is_pulled_back_a_few_times(case, expected, monkeypatch):
    outputs, parameters, _ = outputs_and_parameters(case)
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or grad(*args, **kwargs)
    )
    jacobian(outputs, parameters)
    assert len(calls) == expected


NARROW = [
    (case, torch.float32)
    for case in ("plain", "unknown coefficient", "attention", "with groups", "one vector")
]
NARROW += [(case, torch.float32) for case in ("concatenated", "only one in two residuals")]
NARROW += [(case, torch.bfloat16) for case in ("plain", "unknown coefficient", "one vector")]


@pytest.mark.parametrize(("case", "dtype"), NARROW)
def test_narrow_dtypes(case, dtype, monkeypatch, caplog):
    for name in ("X", "EDGE", "SEQUENCES", "IMAGES", "T"):
        monkeypatch.setitem(globals(), name, globals()[name].to(dtype))
    outputs, parameters, by_rows = outputs_and_parameters(case, dtype)
    caplog.set_level("INFO", "ngd_optim")
    found = jacobian(outputs, parameters)
    assert found.dtype == torch.float32
    assert_near(found, dense_rows(outputs, parameters), torch.finfo(dtype).eps * 10)
    assert pulled_by_rows(caplog) == by_rows


def test_parameters_of_several_dtypes_that_are_not_contiguous(caplog):
    model = Weights((5, 2), (5,))
    model.w0 = nn.Parameter(torch.randn(2, 5).T)
    model.w1.data = model.w1.data.double()
    x = X.float()
    outputs = [(x @ model.w0.T).tanh().double() @ model.w1, (x @ model.w0.T).sum(1)]
    parameters = FlatParameters([{"params": [model.w1, model.w0]}])
    caplog.set_level("INFO", "ngd_optim")
    assert_near(jacobian(outputs, parameters), dense_rows(outputs, parameters), 1e-6)
    assert pulled_by_rows(caplog) == 0


def test_frozen_parameters_have_no_columns(caplog):
    model = model_of(tanh_net)
    model[0].weight.requires_grad_(False)
    parameters = FlatParameters([{"params": list(model.parameters())}])
    outputs = [model(X)]
    caplog.set_level("INFO", "ngd_optim")
    assert_near(jacobian(outputs, parameters), dense_rows(outputs, parameters), 1e-12)
    assert pulled_by_rows(caplog) == 0


D = torch.complex128
Z = torch.complex(torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64))
COMPLEX = {
    "layers": (
        [(4, 3), (4,), (2, 4)],
        lambda W, b, V: torch.view_as_real((Z @ W.T + b).tanh() @ V.mH),
    ),
    "linear": ([(4, 3), (4,)], lambda W, b: F.linear(Z, W, b).abs()),
    "real factor": ([3, (4, 3)], lambda s, W: ((Z * s) @ W.T).abs()),
    "real weight, cast": ([12], lambda w: torch.view_as_real(Z @ w.view(3, 4).to(D))),
    "a real and a complex use": ([3], lambda w: Z.real @ w + (Z @ w.to(D)).imag),
    "pairs": ([12], lambda w: (Z @ torch.view_as_complex(w.view(3, 2, 2))).abs()),
    "parts of a weight": ([(4, 3)], lambda W: Z.real @ W.real.T + Z.imag @ W.imag.T),
    "a weight as pairs": ([(2, 2)], lambda W: Z.real[:, :2] @ torch.view_as_real(W).flatten(1)),
    "vector": ([(3,)], lambda w: (Z @ w).abs()),
    "scalars": ([(), ()], lambda a, b: (a * Z[:, 0] + b).abs()),
    "function of a weight": ([(4, 3)], lambda W: torch.view_as_real(Z @ (W * W.abs()).T)),
    "quadratic form": (
        [(3, 3)],
        lambda W: torch.einsum("ni,ij,nj->n", Z.conj(), W + W.mH, Z).real,
    ),
    "transform": ([(4, 3)], lambda W: torch.fft.fft(Z @ W.T, dim=1).abs()),
    "convolution": ([(2, 4, 2)], lambda W: F.conv1d(SEQUENCES.to(D).mT * 1j, W).abs()),
}
"""Sizes of real parameters, shapes of complex ones, and outputs as a function of both."""


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_networks_are_pulled_back_twice(name, caplog):
    shapes, function = COMPLEX[name]
    torch.manual_seed(3)
    params = [
        nn.Parameter(torch.randn(shape, dtype=D if isinstance(shape, tuple) else torch.float64))
        for shape in shapes
    ]
    parameters, outputs = FlatParameters([{"params": params}]), [function(*params)]
    caplog.set_level("INFO", "ngd_optim")
    assert_near(jacobian(outputs, parameters), dense_rows(outputs, parameters), 1e-12)
    assert pulled_by_rows(caplog) == 0


def test_few_rows_are_pulled_back_at_once(caplog):
    model = model_of(tanh_net)
    parameters = FlatParameters([{"params": list(model.parameters())}])
    outputs = [model(X[:20]), model(EDGE).sum(), model(EDGE[:9])]
    caplog.set_level("INFO", "ngd_optim")
    assert_near(jacobian(outputs, parameters), dense_rows(outputs, parameters), 1e-12)
    assert not caplog.text


@pytest.mark.parametrize(
    ("case", "is_cheap"),
    [
        ("plain", True),
        ("laplacian by autograd", True),
        ("several per sample", False),
        ("group norm", False),
    ],
)
def test_cheap_jacobian(case, is_cheap):
    outputs, parameters, _ = outputs_and_parameters(case)
    found = compute_cheap_jacobian(outputs, parameters)
    assert (found is not None) is is_cheap
    if found is not None:
        assert_near(found, dense_rows(outputs, parameters), 1e-12)


def test_samples_in_reverse_order_are_told_apart(caplog):
    """All 40 terms are there in the order of the samples, backwards."""
    model = model_of(tanh_net)
    parameters = FlatParameters([{"params": list(model.parameters())}])
    outputs = [model(X).flip(0)]
    caplog.set_level("INFO", "ngd_optim")
    assert_near(jacobian(outputs, parameters), dense_rows(outputs, parameters), 1e-12)
    assert not caplog.text


def test_a_tiny_column_is_not_taken_for_rounding():
    model = model_of(lambda: Weights((2,), (6,)))
    outputs = [(X @ model.w0) + 1e-18 * model.w1[WORDS[:, 0]]]
    parameters = FlatParameters([{"params": list(model.parameters())}])
    found, truth = jacobian(outputs, parameters), dense_rows(outputs, parameters)
    assert_near(found[:, 2:] * 1e18, truth[:, 2:] * 1e18, 1e-12)
