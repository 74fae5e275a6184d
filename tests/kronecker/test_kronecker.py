"""Kronecker factors: where the graph uses weights, what the factors are, and the inverse that they make."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.metrics import output_metric_of
from helpers.models import mlp
from helpers.problems import assert_near, real, seeded
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from ngd_optim.curvature.metric import OutputMetric
from ngd_optim.distributed import ALONE
from ngd_optim.jacobian.layers import Layer, uses_of
from ngd_optim.kronecker import estimate
from ngd_optim.kronecker.blocks import KroneckerInverse
from ngd_optim.kronecker.estimate import estimate_factors, is_worthwhile
from ngd_optim.kronecker.factors import (
    KroneckerFactors,
    pack_factor,
    unpack_factor,
)
from ngd_optim.parameters import FlatParameters

N, IN, OUT, STEPS = 5, 3, 4, 2


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(real(*shape))


# Where the graph uses weights


@dataclass(frozen=True)
class Found:
    """What ``uses_of`` should find of a weight: the layer's other entries, by name, and ``n`` for each use."""

    bias: str | None = None
    flipped: bool = False
    groups: int = 1
    lengths: tuple[int, ...] = (N,)


@dataclass(frozen=True)
class Case:
    """An output, from parameters that are made for it, and what should be found.

    Attributes:
        partly: names of weights that have other uses, which are not found.
    """

    make: Callable[[], tuple[Callable[[], Tensor], dict[str, Tensor]]]
    found: dict[str, Found] = field(default_factory=dict)
    partly: tuple[str, ...] = ()


def of_module(
    module: Callable[[], nn.Module],
    shape: tuple[int, ...],
    call: Callable[[Any, Tensor], Tensor] = lambda m, x: m(x),
) -> Callable[[], tuple[Callable[[], Tensor], dict[str, Tensor]]]:
    def make() -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
        model, x = module().double(), real(*shape)
        return lambda: call(model, x), dict(model.named_parameters())

    return make


def of_tensors(
    function: Callable[..., Tensor], **shapes: tuple[int, ...]
) -> Callable[[], tuple[Callable[[], Tensor], dict[str, Tensor]]]:
    def make() -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
        named: dict[str, Tensor] = {name: weight(*shape) for name, shape in shapes.items()}
        return lambda: function(**named), named

    return make


def linear(bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(IN, OUT, bias=bias)


def physics(model: nn.Module, x: Tensor) -> Tensor:
    """The second derivative of a network in its input."""
    x = x.clone().requires_grad_()
    (du,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
    return torch.autograd.grad(du.sum(), x, create_graph=True)[0]


def physics_by_func(model: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda row: jvp(model, (row,), (torch.ones_like(row),))[1])(x)


small_mlp = partial(mlp, IN, 6, 2)


def by_bfloat16(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


LINEAR = {
    f"Linear, {x.replace('N', str(N))}{', no bias' * (not bias)}": Case(
        of_module(linear(bias), shape),
        {"weight": Found("bias" if bias else None, lengths=(length,))},
    )
    for x, shape, length in [
        ("vector", (IN,), 1),
        ("matrix", (N, IN), N),
        ("3-D", (2, N, IN), 2 * N),
        ("4-D", (2, 3, N, IN), 6 * N),
    ]
    for bias in (True, False)
}
MATRIX_PRODUCTS = {
    "Linear, strided matrix": Case(
        of_module(linear(), (IN, N), lambda m, x: m(x.T)), {"weight": Found("bias")}
    ),
    # Here torch adds the bias by an operation of its own.
    "Linear, strided 3-D": Case(
        of_module(linear(), (IN, N, 2), lambda m, x: m(x.permute(2, 1, 0))),
        {"weight": Found(lengths=(2 * N,))},
    ),
    "x @ W + b": Case(
        of_tensors(lambda W, b: real(N, IN) @ W + b, W=(IN, OUT), b=(OUT,)),
        {"W": Found(flipped=True)},
    ),
    "3-D x @ W": Case(
        of_tensors(lambda W: real(2, N, IN) @ W, W=(IN, OUT)),
        {"W": Found(flipped=True, lengths=(2 * N,))},
    ),
    "vector @ W": Case(
        of_tensors(lambda W: real(IN) @ W, W=(IN, OUT)), {"W": Found(flipped=True, lengths=(1,))}
    ),
    **{
        f"x @ W{name}": Case(
            of_tensors(lambda W, f=transpose: real(N, IN) @ f(W), W=(OUT, IN)), {"W": Found()}
        )
        for name, transpose in {
            ".T": lambda W: W.T,
            ".t()": torch.t,
            ".mT": lambda W: W.mT,
            ".transpose": lambda W: W.transpose(-1, 0),
            ".permute": lambda W: W.permute(-1, 0),
        }.items()
    },
    "x @ W.permute(0, 1)": Case(
        of_tensors(lambda W: real(N, IN) @ W.permute(-2, -1).T.T, W=(IN, OUT)),
        {"W": Found(flipped=True)},
    ),
    "W @ x": Case(of_tensors(lambda W: W @ real(IN, N), W=(OUT, IN)), {"W": Found()}),
    "W.T @ x": Case(of_tensors(lambda W: W.T @ real(IN, N), W=(IN, OUT)), {"W": Found()}),
    "addmm": Case(
        of_tensors(lambda W, b: torch.addmm(b, real(N, IN), W), W=(IN, OUT), b=(OUT,)),
        {"W": Found("b", flipped=True)},
    ),
    "addmm, bias for each row": Case(
        of_tensors(lambda W, b: torch.addmm(b, real(N, IN), W), W=(IN, OUT), b=(N, OUT)),
        {"W": Found(flipped=True)},
    ),
    "addmm, scaled": Case(
        of_tensors(lambda W, b: torch.addmm(b, real(N, IN), W, alpha=2), W=(IN, OUT), b=(OUT,)),
    ),
    "LoRA": Case(
        of_tensors(lambda A, B: (real(N, IN) @ A) @ B, A=(IN, 2), B=(2, OUT)),
        {"A": Found(flipped=True), "B": Found(flipped=True)},
    ),
    "LoRA, merged": Case(of_tensors(lambda A, B: real(N, IN) @ (A @ B), A=(IN, 2), B=(2, OUT))),
    "scaled weight": Case(of_tensors(lambda W: real(N, IN) @ (2 * W), W=(IN, OUT))),
    "tied, once transposed": Case(
        of_tensors(
            lambda W, b, c: F.linear(F.linear(real(N, IN), W, b).tanh(), W.t(), c),
            W=(OUT, IN),
            b=(OUT,),
            c=(IN,),
        ),
        {"W": Found("c", flipped=True, lengths=(N, N))},
    ),
    "square, both orientations": Case(
        of_tensors(
            lambda W, b: torch.addmm(b, F.linear(real(N, IN), W, b).tanh(), W), W=(IN, IN), b=(IN,)
        ),
        {"W": Found("b", flipped=True, lengths=(N, N))},
        partly=("b",),
    ),
    "one bias for two weights": Case(
        of_tensors(
            lambda W, V, b: F.linear(real(N, IN), W, b) * F.linear(real(N, 2), V, b),
            W=(OUT, IN),
            V=(OUT, 2),
            b=(OUT,),
        ),
        {"W": Found(), "V": Found("b")},
        partly=("b",),
    ),
    "double weight": Case(
        of_tensors(lambda W: real(N, IN).float() @ W.float(), W=(IN, OUT)),
        {"W": Found(flipped=True)},
    ),
    "sparse input": Case(
        of_tensors(lambda W: real(N, IN).relu().to_sparse() @ W, W=(IN, OUT)),
        {"W": Found(flipped=True)},
    ),
    "compressed input": Case(
        of_tensors(lambda W: real(N, IN).relu().to_sparse_csr() @ W, W=(IN, OUT)),
        {"W": Found(flipped=True)},
    ),
    "complex": Case(
        of_tensors(lambda W: (real(N, IN) * (1 + 2j) @ W.to(torch.complex128)).abs(), W=(IN, OUT))
    ),
    "head of an embedding": Case(
        of_tensors(lambda W: F.embedding(torch.tensor([0, 2, 2]), W).tanh() @ W.T, W=(OUT, IN)),
        {"W": Found(lengths=(3,))},
        partly=("W",),
    ),
}
CONVOLUTIONS = {
    "Conv1d": Case(
        of_module(lambda: nn.Conv1d(2, 4, 3), (N, 2, 7)),
        {"weight": Found("bias", lengths=(5 * N,))},
    ),
    "Conv2d, same": Case(
        of_module(lambda: nn.Conv2d(2, 3, (3, 2), padding="same"), (N, 2, 4, 5)),
        {"weight": Found("bias", lengths=(20 * N,))},
    ),
    "Conv2d, strides, dilation, padding": Case(
        of_module(
            lambda: nn.Conv2d(
                2, 3, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 3), bias=False
            ),
            (N, 2, 5, 4),
        ),
        {"weight": Found(lengths=(3 * 8 * N,))},
    ),
    "Conv2d, circular": Case(
        of_module(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (N, 2, 4, 4)),
        {"weight": Found("bias", lengths=(16 * N,))},
    ),
    "Conv2d, one image": Case(
        of_module(lambda: nn.Conv2d(2, 3, 3), (2, 4, 5)), {"weight": Found("bias", lengths=(6,))}
    ),
    "Conv2d, channels last": Case(
        of_module(
            lambda: nn.Conv2d(2, 3, 3),
            (N, 2, 4, 4),
            lambda m, x: m(x.to(memory_format=torch.channels_last)),
        ),
        {"weight": Found("bias", lengths=(4 * N,))},
    ),
    "Conv3d, groups": Case(
        of_module(lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1), groups=2), (N, 4, 3, 4, 3)),
        {"weight": Found("bias", groups=2, lengths=(2 * 2 * 2 * N,))},
    ),
    "Conv2d, depthwise": Case(
        of_module(lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (N, 3, 4, 4)),
        {"weight": Found("bias", groups=3, lengths=(16 * N,))},
    ),
    "shared between groups": Case(
        of_tensors(
            lambda W: F.conv1d(real(N, 2, 5), W) + F.conv1d(real(N, 4, 5), W, groups=2), W=(4, 2, 3)
        ),
        {"W": Found(groups=2, lengths=(3 * N,))},
        partly=("W",),
    ),
    "transposed weight": Case(
        of_tensors(lambda W: F.conv1d(real(N, 2, 5), W.transpose(0, 1)), W=(2, 4, 3))
    ),
    "ConvTranspose2d": Case(of_module(lambda: nn.ConvTranspose2d(2, 3, 3), (N, 2, 4, 4))),
}
GATES = {"weight_ih": Found("bias_ih"), "weight_hh": Found("bias_hh")}
GATES_IN_TIME = {
    "weight_ih_l0": Found("bias_ih_l0", lengths=(N * STEPS,)),
    "weight_hh_l0": Found("bias_hh_l0", lengths=(N,) * STEPS),
}


def recurrent(m: Any, x: Tensor) -> Tensor:
    """By the kernels that a closure's trace chooses."""
    torch.backends.mkldnn.enabled, before = False, torch.backends.mkldnn.enabled  # pyright: ignore
    try:
        return m(x)[0]
    finally:
        torch.backends.mkldnn.enabled = before  # pyright: ignore


MODELS = {
    "MultiheadAttention": Case(
        of_module(lambda: nn.MultiheadAttention(4, 2), (STEPS, N, 4), lambda m, x: m(x, x, x)[0]),
        {
            "in_proj_weight": Found("in_proj_bias", lengths=(N * STEPS,)),
            "out_proj.weight": Found("out_proj.bias", lengths=(N * STEPS,)),
        },
    ),
    "TransformerEncoderLayer": Case(
        of_module(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0), (STEPS, N, 4)),
        {
            f"{name}weight": Found(f"{name}bias", lengths=(N * STEPS,))
            for name in ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.")
        },
    ),
    "LSTM": Case(of_module(lambda: nn.LSTM(IN, 2), (STEPS, N, IN), recurrent), GATES_IN_TIME),
    "GRU": Case(of_module(lambda: nn.GRU(IN, 2), (STEPS, N, IN), recurrent), GATES_IN_TIME),
    "LSTMCell": Case(
        of_module(lambda: nn.LSTMCell(IN, 2), (N, IN), lambda m, x: m(x, (x[:, 1:], x[:, :2]))[0]),
        GATES,
    ),
    "GRUCell": Case(
        of_module(lambda: nn.GRUCell(IN, 2), (N, IN), lambda m, x: m(x, x[:, :2])), GATES
    ),
    # The derivatives use the weights again, without their biases.
    "derivative of a network": Case(
        of_module(small_mlp, (N, IN), physics),
        {
            "0.weight": Found("0.bias", lengths=(N,) * 3),
            "2.weight": Found("2.bias", lengths=(N,) * 4),
        },
    ),
    "derivative by torch.func": Case(
        of_module(small_mlp, (N, IN), physics_by_func),
        {"0.weight": Found(lengths=(N, N)), "2.weight": Found(lengths=(N,))},
        partly=("0.bias",),
    ),
    "checkpoint": Case(
        of_module(small_mlp, (N, IN), lambda m, x: checkpoint(m, x, use_reentrant=False)),
        {"0.weight": Found("0.bias"), "2.weight": Found("2.bias")},
    ),
    "weight_norm": Case(
        of_module(lambda: parametrizations.weight_norm(nn.Linear(IN, OUT)), (N, IN))
    ),
    "spectral_norm": Case(
        of_module(lambda: parametrizations.spectral_norm(nn.Linear(IN, OUT)), (N, IN))
    ),
    "LayerNorm": Case(of_module(lambda: nn.LayerNorm(IN), (N, IN))),
    "Embedding": Case(
        of_module(lambda: nn.Embedding(4, IN), (1,), lambda m, _: m(torch.tensor([0, 3, 3])))
    ),
    "Bilinear": Case(of_module(lambda: nn.Bilinear(IN, IN, 2), (N, IN), lambda m, x: m(x, x))),
}
CASES = {**LINEAR, **MATRIX_PRODUCTS, **CONVOLUTIONS, **MODELS}


@pytest.mark.parametrize("name", CASES)
def test_uses_are_found_and_their_rows_make_the_gradient(name):
    """``Σ l rᵀ`` over all uses of a weight is what autograd gives, and the sum of the output's side is the bias's."""
    case = CASES[name]
    call, named = case.make()
    names, params = list(named), list(named.values())
    output = call()
    uses = uses_of([output], params)

    found = {}
    for use in uses:
        layer = use.layer
        bias = None if layer.bias is None else names[layer.bias]
        found.setdefault((names[layer.weight], bias, layer.flipped, layer.groups), []).append(
            use.length
        )
    expected = {(w, f.bias, f.flipped, f.groups): list(f.lengths) for w, f in case.found.items()}
    assert found == expected

    u = torch.randn_like(output)
    gradients = torch.autograd.grad(output, params, u, retain_graph=True, materialize_grads=True)
    sums: dict[str, Tensor] = {}
    for use in uses:
        (at_node,) = torch.autograd.grad(
            output, torch.autograd.graph.GradientEdge(use.node, 0), u, retain_graph=True
        )
        left, right = use.rows(at_node)
        assert left.shape[:2] == right.shape[:2] == (use.layer.groups, use.length)
        parts = {use.layer.weight: left.mT @ right}
        if use.adds_bias and use.layer.bias is not None:
            parts[use.layer.bias] = (right if use.layer.flipped else left).sum(1)
        for i, part in parts.items():
            sums[names[i]] = sums.get(names[i], 0) + part.reshape(params[i].shape).double()
    assert {f.bias for f in case.found.values()} - {None} <= sums.keys()
    for i, summed in sums.items():
        if i not in case.partly:
            assert_near(
                summed, gradients[names.index(i)], 1e-6 if name == "double weight" else 1e-12
            )


@pytest.mark.parametrize("make", [small_mlp, lambda: nn.Conv2d(1, 2, 2)], ids=["mlp", "conv"])
def test_weights_are_found_behind_autocast(make):
    model = make()
    x = torch.randn(N, IN) if isinstance(model, nn.Sequential) else torch.randn(N, 1, 3, 3)
    params = list(model.parameters())
    output = by_bfloat16(model, x)
    assert output.dtype == torch.bfloat16
    layers = {use.layer for use in uses_of([output], params)}
    assert layers == {Layer(i, i + 1, flipped=False, groups=1) for i in range(0, len(params), 2)}


def test_a_frozen_or_foreign_weight_is_no_layer():
    model = small_mlp()
    model[0].requires_grad_(False)
    trained = [model[2].bias]
    assert uses_of([model(torch.randn(N, IN))], trained) == []
    (use,) = uses_of([model(torch.randn(N, IN))], [model[2].weight])
    assert use.layer == Layer(0, None, flipped=False, groups=1)


# What the factors are


def factors(
    closure: Callable[[], Any], params: Iterable[Tensor], seed: int = 0
) -> KroneckerFactors:
    parameters = FlatParameters([{"params": list(params)}])
    metric = output_metric_of(closure, parameters.tensors)
    return estimate_factors(
        uses_of(metric.outputs, parameters.tensors), metric, parameters, seeded(seed)
    )


def pair(
    closure: Callable[[], Any], params: Iterable[Tensor], index: int = 0
) -> tuple[Tensor, Tensor]:
    values = factors(closure, params).values
    return unpack_factor(values[index, "left"]), unpack_factor(values[index, "right"])


def dense(
    factors: KroneckerFactors, params: list[Tensor], shift: list[float] | None = None
) -> Tensor:
    """The matrix that factors stand for: damped, block by block, by the formulas of Martens & Grosse, section 6.3."""
    sizes = [p.numel() for p in params]
    places = [
        part.view(p.shape)
        for part, p in zip(torch.arange(sum(sizes)).split(sizes), params, strict=True)
    ]
    matrix = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)

    def matrices(side: Tensor) -> list[Tensor]:
        return [
            (factor.diag() if factor.ndim == 1 else factor).double()
            for factor in unpack_factor(side)
        ]

    for layer in factors.layers:
        joined = layer.join(
            places[layer.weight], None if layer.bias is None else places[layer.bias]
        )
        lefts, rights = factors.values[layer.weight, "left"], factors.values[layer.weight, "right"]
        for where, left, right in zip(joined, matrices(lefts), matrices(rights), strict=True):
            if shift is not None:
                pi = math.sqrt((right.trace() / len(right)) / (left.trace() / len(left)))
                left = left + shift[layer.weight] ** 0.5 / pi * torch.eye(
                    len(left), dtype=torch.float64
                )
                right = right + shift[layer.weight] ** 0.5 * pi * torch.eye(
                    len(right), dtype=torch.float64
                )
            matrix[where.flatten()[:, None], where.flatten()] = torch.kron(left, right)
    for (i, name), value in factors.values.items():
        if name == "diagonal":
            where = places[i].flatten()
            matrix[where, where] = value.flatten().double() + (0 if shift is None else shift[i])
    return matrix


def gauss_newton(metric: OutputMetric, params: list[Tensor]) -> Tensor:
    """Jᵀ H J, from unit vectors."""
    rows = []
    for i in range(sum(z.numel() for z in metric.outputs)):
        units = torch.zeros(sum(z.numel() for z in metric.outputs), dtype=torch.float64)
        units[i] = 1
        unit = [
            u.view(z.shape)
            for u, z in zip(
                units.split([z.numel() for z in metric.outputs]), metric.outputs, strict=True
            )
        ]
        images = [
            torch.autograd.grad(metric.outputs, params, u, retain_graph=True)
            for u in (unit, metric.apply_hessian(unit))
        ]
        rows.append([torch.cat([g.flatten() for g in image]) for image in images])
    jacobian, weighed = (torch.stack(part) for part in zip(*rows, strict=True))
    return jacobian.T @ weighed


ORTHOGONAL = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).double()
"""Four samples' signs for two outputs: ``Σ s sᵀ = 4 I``, as for the mean of many random ones."""

EXACT = {
    "F.linear": (lambda x, W, b: F.linear(x, W, b), (2, IN), (2,)),
    "x @ W": (lambda x, W, b: torch.addmm(b, x, W), (IN, 2), (2,)),
    "W @ x": (lambda x, W, b: (W @ x.T).T + 0 * b, (2, IN), (2,)),
    "convolution": (
        lambda x, W, b: F.conv2d(x.view(4, IN, 1, 1), W, b).flatten(1),
        (2, IN, 1, 1),
        (2,),
    ),
    "groups": (
        lambda x, W, b: F.conv1d(x.repeat(1, 2).view(4, 6, 1), W, b, groups=2).flatten(1),
        (2, IN, 1),
        (2,),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_one_layer_with_squares_has_exactly_the_gauss_newton_matrix(name, monkeypatch):
    forward, *shapes = EXACT[name]
    params: list[Tensor] = [weight(*shape) for shape in shapes]
    x, y = real(4, IN), real(4, 2)
    monkeypatch.setattr(estimate, "draw", lambda metric, _: [0.5 * ORTHOGONAL])  # H_z = ¼ I
    closure = lambda: F.mse_loss(forward(x, *params), y)  # noqa: E731
    metric = output_metric_of(closure, params)
    expected = gauss_newton(metric, params)
    found = dense(factors(closure, params), params)
    if name == "W @ x":  # the bias is no part of the product, and is not used
        expected[-2:, :], expected[:, -2:], found[-2:, :] = 0, 0, 0
    assert_near(found, expected, 1e-12)


def test_the_mean_over_draws_is_the_gauss_newton_matrix():
    params: list[Tensor] = [weight(OUT, IN), weight(OUT)]
    x, y = real(N, IN), real(N, OUT)
    closure = lambda: F.mse_loss(F.linear(x, *params), y)  # noqa: E731
    draws = torch.stack([dense(factors(closure, params, seed), params) for seed in range(300)])
    expected = gauss_newton(output_metric_of(closure, params), params)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    assert error.max() <= 0.06 * expected.diagonal().max()


def images() -> tuple[Tensor, Tensor]:
    return real(N, 4, 5, 4), real(N, 6, 3, 2)


OPTIONS = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}


def test_the_factors_of_a_convolution_are_those_of_the_unfolded_linear_layer():
    x, y = images()
    W, b = weight(6, 4, 3, 2), weight(6)
    patches = F.unfold(x, (3, 2), **OPTIONS).mT.contiguous()
    flat = nn.Parameter(W.detach().flatten(1))

    def unfolded() -> Tensor:
        return F.linear(patches, flat, b).mT.reshape(y.shape)

    by_convolution = pair(lambda: F.mse_loss(F.conv2d(x, W, b, **OPTIONS), y), [W, b])
    by_linear = pair(lambda: F.mse_loss(unfolded(), y), [flat, b])
    for found, expected in zip(by_convolution, by_linear, strict=True):
        assert_near(found, expected, 1e-12)


def test_groups_are_separate_layers():
    x, y = images()
    W, b = weight(6, 2, 3, 2), weight(6)
    joined = pair(lambda: F.mse_loss(F.conv2d(x, W, b, groups=2, **OPTIONS), y), [W, b])
    halves = [
        [nn.Parameter(t.detach()[part]) for t in (W, b)] for part in (slice(0, 3), slice(3, 6))
    ]

    def apart() -> Tensor:
        return torch.cat(
            [
                F.conv2d(part, *half, **OPTIONS)
                for part, half in zip(x.chunk(2, 1), halves, strict=True)
            ],
            1,
        )

    params = [p for half in halves for p in half]
    for i in range(2):
        separate = pair(lambda: F.mse_loss(apart(), y), params, 2 * i)
        for found, expected in zip(joined, separate, strict=True):
            assert_near(found[i], expected[0], 1e-12)


def test_a_weight_on_the_right_has_the_factors_of_its_transpose():
    x, y, b = real(N, IN), torch.randint(0, OUT, (N,)), weight(OUT)
    W = weight(OUT, IN)
    V = nn.Parameter(W.detach().T.clone())
    by_linear = pair(lambda: F.cross_entropy(F.linear(x, W, b), y), [W, b])
    by_product = pair(lambda: F.cross_entropy(torch.addmm(b, x, V), y), [V, b])
    for found, expected in zip(by_product, by_linear, strict=True):
        assert_near(found, expected, 1e-12)


def test_several_uses_have_the_sum_of_their_traces():
    """And of two equal uses each factor is that of one, times √2."""
    W, b, x, y = weight(IN, IN), weight(IN), real(N, IN), real(N, IN)
    uses_once = pair(lambda: F.mse_loss(F.linear(x, W, b), y), [W, b])
    twice = pair(
        lambda: F.mse_loss(F.linear(x, W, b), y) + F.mse_loss(F.linear(x, W, b), y), [W, b]
    )
    assert_near(twice[1], math.sqrt(2) * uses_once[1], 1e-12)
    assert_near(
        twice[0].diagonal(dim1=1, dim2=2),
        math.sqrt(2) * uses_once[0].diagonal(dim1=1, dim2=2),
        1e-12,
    )

    metric = output_metric_of(
        lambda: F.mse_loss(F.linear(F.linear(x, W, b).tanh(), W.T), y), [W, b]
    )
    parameters = FlatParameters([{"params": [W, b]}])
    uses = uses_of(metric.outputs, [W, b])
    values = estimate_factors(uses, metric, parameters, seeded()).values
    u = estimate.draw(metric, seeded())
    total = 0.0
    for use in uses:
        edge = torch.autograd.graph.GradientEdge(use.node, 0)
        (at_node,) = torch.autograd.grad(metric.outputs, edge, u, retain_graph=True)
        left, right = use.rows(at_node)
        ones = use.length * use.adds_bias
        total += left.square().sum() * (right.square().sum() + ones) / use.length
    traces = [
        unpack_factor(values[0, name]).diagonal(dim1=1, dim2=2).sum() for name in ("left", "right")
    ]
    assert_near(traces[0] * traces[1], total, 1e-12)


def test_what_is_in_no_layer_has_the_square_of_one_gradient():
    model = nn.Sequential(nn.Embedding(4, IN), nn.LayerNorm(IN), nn.Linear(IN, OUT)).double()
    index, y = torch.tensor([0, 0, 2]), torch.randint(0, OUT, (3,))
    params = list(model.parameters())
    metric = output_metric_of(lambda: F.cross_entropy(model(index), y), params)
    values = factors(lambda: F.cross_entropy(model(index), y), params).values
    gradients = torch.autograd.grad(metric.outputs, params[:3], estimate.draw(metric, seeded()))
    assert values.keys() == {
        (0, "diagonal"),
        (1, "diagonal"),
        (2, "diagonal"),
        (3, "left"),
        (3, "right"),
    }
    for i, gradient in enumerate(gradients):
        assert_near(values[i, "diagonal"], gradient.square(), 1e-12)
    assert not values[0, "diagonal"][1].any()


class CutsOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_where_nothing_comes_back_the_factors_are_zero():
    model, x, y = small_mlp().double(), real(N, IN), real(N, 2)
    unused = weight(2)
    params = [*model.parameters(), unused]
    closure = lambda: F.mse_loss(model[2](CutsOff.apply(model[0](x))), y)  # noqa: E731
    values = factors(closure, params).values
    assert not values[0, "left"].any()
    assert not values[4, "diagonal"].any()
    assert values[2, "left"].any()


def test_a_use_without_rows_adds_nothing():
    """As of an expert that no sample is sent to."""
    model, idle, x, y = small_mlp().double(), nn.Linear(IN, 2).double(), real(N, IN), real(N, 2)

    def closure(*batches: Tensor) -> Tensor:
        return F.mse_loss(torch.cat([model(x), *map(idle, batches)]), y)

    params = [*model.parameters(), *idle.parameters()]
    values = factors(lambda: closure(x[:0]), params).values
    for key, value in factors(lambda: closure(), list(model.parameters())).values.items():
        assert_near(values[key], value, 1e-12)
    assert not values[4, "left"].any()
    assert not values[4, "right"].any()


@pytest.mark.parametrize("module", [nn.Linear(6, 3), nn.Conv1d(6, 3, 1)], ids=["Linear", "Conv1d"])
def test_the_longer_sides_have_the_diagonal_of_their_factor(module, monkeypatch):
    module, x = module.double(), real(N, 6, *([4] if isinstance(module, nn.Conv1d) else []))
    closure = lambda: F.mse_loss(module(x), module(x).detach() + 1)  # noqa: E731
    whole = pair(closure, module.parameters())
    monkeypatch.setattr(KroneckerFactors, "longest", 4)
    left, right = pair(closure, module.parameters())
    assert_near(left, whole[0], 1e-12)
    assert_near(right, whole[1].diagonal(dim1=1, dim2=2), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_coarse_dtypes_have_nearly_the_same_factors(dtype):
    model, x, y = (
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), mlp_of(12)),
        torch.randn(40, 2, 5),
        torch.arange(40) % 3,
    )

    def closure_of(model: nn.Module, dtype: torch.dtype) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return F.cross_entropy(model(x.double() if dtype == torch.float64 else x), y)

        return closure

    coarse = factors(closure_of(model, dtype), list(model.parameters())).values
    model = model.double()
    fine = factors(closure_of(model, torch.float64), list(model.parameters())).values
    for key, value in coarse.items():
        assert value.dtype == torch.float32
        assert_near(value.double(), fine[key], 1e-5 if dtype == torch.float32 else 0.05)


def mlp_of(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, 3))


def test_a_part_of_many_rows_stands_for_all():
    layer, x = nn.Linear(4, 5, bias=False).double(), real(67, 4)
    (use,) = uses_of([layer(x)], [layer.weight])
    gradient, seen = real(67, 5), {}
    for seed in range(60):
        kept = estimate._choose_rows([(use, gradient)], [layer.weight], seeded(seed))
        left, right = use.sides(gradient, torch.float64, kept)
        assert kept.step == 4
        assert left.shape[1] == right.shape[1] in (16, 17)
        seen[kept.start] = left.mT @ left, right.mT @ right
    assert len(seen) == 4
    lefts, rights = zip(*seen.values(), strict=True)
    assert_near(sum(lefts)[0], gradient.T @ gradient, 1e-12)
    assert_near(sum(rights)[0] / 4, x.T @ x, 1e-12)
    (few,) = uses_of([layer(x[:19])], [layer.weight])
    assert estimate._choose_rows([(few, gradient)], [layer.weight], seeded()).step == 1


def test_a_row_that_is_an_outlier_is_cut():
    rows = torch.cat([torch.ones(1, 99, 2), 1e3 * torch.ones(1, 1, 2)], 1).double()
    weights = estimate._weights(rows, 0.5 * torch.eye(2).double()[None])
    assert_near(weights[0, :99], 0.5 * torch.ones(99).double(), 1e-12)
    assert weights[0, 99].item() == pytest.approx(10 * (99 * 0.5 + 0.5e6) / 100)


def test_weighing_by_the_inverse_settles_at_the_factors_of_a_product():
    """Of rows whose covariance is L ⊗ R, the iteration ends there (Dutilleul 1999)."""
    torch.manual_seed(0)
    a, b = real(3, 3), real(4, 4)
    back, into = real(1, 40000, 3) @ a / 200, real(1, 40000, 4) @ b
    left, right = torch.eye(3).double()[None], torch.eye(4).double()[None]
    for _ in range(20):
        new = estimate._by_inverses(back, into, (left.inverse(), right.inverse()), 3)
        left, right = (0.5 * (x + y) for x, y in zip((left, right), new, strict=True))
    assert_near(torch.kron(left[0], right[0]), torch.kron(a.T @ a, b.T @ b), 0.05)


def test_the_mean_of_several_closures():
    model = small_mlp().double()
    params = list(model.parameters())
    y, batches = torch.zeros(N, 2).double(), (real(N, IN), real(N, IN))
    one, two = (factors(lambda x=x: F.mse_loss(model(x), y), params) for x in batches)
    mean = KroneckerFactors.average([one, two], ALONE)
    assert mean is not None
    assert KroneckerFactors.average([one], ALONE) == one
    for key, value in mean.values.items():
        assert_near(value, (one.values[key] + two.values[key]) / 2, 1e-12)
    other = factors(lambda: F.mse_loss(model[0](real(N, IN)), torch.zeros(N, 6).double()), params)
    assert KroneckerFactors.average([one, other], ALONE) is None
    assert KroneckerFactors.average([], ALONE) is None


def test_both_factors_of_a_square_weight_take_as_much_memory_as_the_weight():
    model, x = nn.Linear(20, 20, bias=False).double(), real(N, 20)
    values = factors(
        lambda: F.mse_loss(model(x), torch.zeros(N, 20).double()), model.parameters()
    ).values
    assert sum(value.numel() for value in values.values()) == 20 * 21


def test_values_fit_their_own_layers_only():
    model, x = (
        nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2)).double(),
        real(N, 4, 3),
    )
    params = list(model.parameters())
    found = factors(lambda: F.mse_loss(model(x), torch.zeros(N, 2).double()), params)
    assert found.fits(params)
    without = {key: value for key, value in found.values.items() if key != (0, "right")}
    assert not KroneckerFactors(found.layers, without).fits(params)
    assert not found.fits([*params, weight(2)])
    for change in ({"bias": None}, {"flipped": True}, {"groups": 1}):
        layers = [
            layer._replace(**change) if layer.groups == 2 else layer for layer in found.layers
        ]
        assert not KroneckerFactors(layers, found.values).fits(params)


WORTHWHILE = {
    "mlp": (small_mlp, (40, IN), True),
    "one sample": (lambda: nn.Linear(40, 40), (1, 40), False),
    "mostly a table": (
        lambda: nn.Sequential(nn.Embedding(100, IN), nn.Linear(IN, OUT)),
        None,
        False,
    ),
    "half a table": (lambda: nn.Sequential(nn.Embedding(4, IN), nn.Linear(IN, OUT)), None, True),
    "no layer": (lambda: nn.LayerNorm(IN), (N, IN), False),
    "conv, few images": (lambda: nn.Conv2d(8, 8, 3), (2, 8, 8, 8), True),
}


@pytest.mark.parametrize("name", WORTHWHILE)
def test_when_factors_are_worthwhile(name):
    make, shape, expected = WORTHWHILE[name]
    model = make()
    x = torch.arange(40) % 4 if shape is None else torch.randn(shape)
    params = list(model.parameters())
    assert is_worthwhile(uses_of([model(x)], params), params) is expected


# The inverse


def spd(groups: int, side: int, rank: int | None = None) -> Tensor:
    rows = real(groups, side if rank is None else rank, side)
    return rows.mT @ rows


def random_factors(
    layers: tuple[Layer, ...], params: list[Tensor], rank: int | None = None
) -> KroneckerFactors:
    inside = {i for layer in layers for i in (layer.weight, layer.bias)}
    values = {
        (i, "diagonal"): real(*p.shape).square() for i, p in enumerate(params) if i not in inside
    }
    for layer in layers:
        groups, rows, columns = layer.shape(params)
        values[layer.weight, "left"] = pack_factor(spd(groups, rows, rank))
        values[layer.weight, "right"] = pack_factor(spd(groups, columns, rank))
    return KroneckerFactors(layers, values)


LAYERS = {
    "weight": ([(OUT, IN)], Layer(0, None, flipped=False, groups=1)),
    "weight and bias": ([(OUT, IN), (OUT,)], Layer(0, 1, flipped=False, groups=1)),
    "bias first": ([(OUT,), (OUT, IN)], Layer(1, 0, flipped=False, groups=1)),
    "flipped": ([(IN, OUT)], Layer(0, None, flipped=True, groups=1)),
    "flipped with bias": ([(IN, OUT), (OUT,)], Layer(0, 1, flipped=True, groups=1)),
    "square and flipped": ([(IN, IN), (IN,)], Layer(0, 1, flipped=True, groups=1)),
    "kernel": ([(2, 3, 2, 2), (2,)], Layer(0, 1, flipped=False, groups=1)),
    "groups": ([(6, 2, 2), (6,)], Layer(0, 1, flipped=False, groups=2)),
    "depthwise": ([(4, 1, 3)], Layer(0, None, flipped=False, groups=4)),
}


def inverse_of(found: KroneckerFactors, params: list[Tensor], shift: list[float]) -> Tensor:
    """The preconditioner as a matrix."""
    parameters = FlatParameters([{"params": params}])
    shifts = [torch.tensor(value, dtype=parameters.dtype) for value in shift]
    solve = KroneckerInverse(found, parameters, shifts)
    n = sum(p.numel() for p in params)
    return torch.stack([solve(unit) for unit in torch.eye(n, dtype=parameters.dtype)], 1)


@pytest.mark.parametrize("diagonal_from", [99, 3], ids=["whole", "with diagonal sides"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_preconditioner_is_the_inverse_of_the_damped_factors(name, diagonal_from):
    shapes, layer = LAYERS[name]
    params: list[Tensor] = [weight(*shape) for shape in (*shapes, (2, 2))]
    found = random_factors((layer,), params)
    values = {
        key: unpack_factor(value).diagonal(dim1=1, dim2=2)
        if key[1] != "diagonal" and unpack_factor(value).shape[1] > diagonal_from
        else value
        for key, value in found.values.items()
    }
    found = KroneckerFactors(found.layers, values)
    shift = [0.3 + i for i in range(len(params))]
    inverse = inverse_of(found, params, shift)
    assert_near(inverse, dense(found, params, shift).inverse(), 1e-9)
    assert_near(inverse, inverse.T, 1e-9)
    assert torch.linalg.eigvalsh(inverse).min() > 0


SINGULAR = {
    "rank 1": lambda side: spd(1, side, 1),
    "rank 2": lambda side: spd(1, side, 2).pow(3),
    "rounded to bfloat16": lambda side: spd(1, side, 1).bfloat16(),
    "zero": lambda side: torch.zeros(1, side, side),
    "huge": lambda side: 1e15 * spd(1, side, 1),
    "small": lambda side: 1e-15 * spd(1, side),
}


@pytest.mark.parametrize("shift", [0.0, 1e-8, 0.1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("left", "right"), list(itertools.product(SINGULAR, SINGULAR)))
def test_singular_factors_have_a_positive_definite_inverse(left, right, dtype, shift):
    params: list[Tensor] = [
        nn.Parameter(torch.zeros(9, 7, dtype=dtype)),
        nn.Parameter(torch.zeros(3, dtype=dtype)),
    ]
    sides = {
        (0, "left"): pack_factor(SINGULAR[left](9)),
        (0, "right"): pack_factor(SINGULAR[right](7)),
    }
    values = sides | {(1, "diagonal"): torch.zeros(3)}
    found = KroneckerFactors(
        (Layer(0, None, flipped=False, groups=1),),
        {key: value.to(dtype) for key, value in values.items()},
    )
    solve = KroneckerInverse(
        found, FlatParameters([{"params": params}]), [torch.tensor(shift, dtype=dtype)] * 2
    )
    r = torch.randn(20, 66, dtype=dtype)
    z = torch.stack([solve(row) for row in r])
    assert z.isfinite().all()
    assert ((r.double() * z.double()).sum(1) > 0).all()
