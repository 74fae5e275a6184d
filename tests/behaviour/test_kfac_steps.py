"""KFAC's steps are those of the same formula, written out with dense matrices in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.metrics import output_metric_of
from helpers.problems import assert_near, flatten, real, seeded
from torch import nn

from ngd_optim import KFAC, NaturalCG, stream
from ngd_optim.kronecker import estimate
from ngd_optim.kronecker.sampling import draw

N = 12


class Tied(nn.Module):
    """One weight that is used twice, with a bias of its own each time, and parameters in no layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.inner(self.scale * self.inner(x).tanh())


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 3, bias=False),
    )


def patches_of(module, x):
    """The rows that a layer multiplies by its weight, with a 1 for the bias."""
    if isinstance(module, nn.Conv2d):
        unfolded = F.unfold(x, module.kernel_size, padding=module.padding)
        x = unfolded.mT.reshape(-1, unfolded.shape[1])
    rows = x.reshape(-1, x.shape[-1])
    return rows if module.bias is None else torch.cat([rows, torch.ones(len(rows), 1).to(rows)], 1)


def outputs_of(module, gradient):
    return gradient.flatten(2).mT.flatten(0, 1) if isinstance(module, nn.Conv2d) else gradient


class Dense:
    """The factors of a model, as matrices that are kept, and the inverse of the whole damped matrix."""

    def __init__(self, model, damping):
        self.model, self.damping = model, damping
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.inside = {id(p) for m in self.layers for p in m.parameters()}
        self.others = [p for p in model.parameters() if id(p) not in self.inside]
        self.values = []

    def renew(self, closure, draws, share):
        """Mix in those of one draw at the outputs."""
        seen = []
        handles = [
            m.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
            for m in self.layers
        ]
        metric = output_metric_of(closure, self.model.parameters())
        for handle in handles:
            handle.remove()
        u = draw(metric, seeded(draws))
        wanted = [*(out for _, _, out in seen), *self.others]
        gradients = torch.autograd.grad(metric.outputs, wanted, u)
        new = []
        known = iter(self.damped()) if self.values else None
        for layer in self.layers:
            pairs = [
                (outputs_of(m, gradient), patches_of(m, x.detach()))
                for (m, x, _), gradient in zip(seen, gradients, strict=False)
                if m is layer
            ]
            back, into = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            if known is None:
                left_weights, right_weights = into.square().sum(1), back.square().sum(1)
            else:
                left, right = next(known), next(known)
                left_weights = (into * torch.linalg.solve(right, into.T).T).mean(1)
                right_weights = (back * torch.linalg.solve(left, back.T).T).mean(1)
                for weights in (left_weights, right_weights):
                    weights.clamp_(max=10 * weights.mean())
            factors = [
                torch.einsum("n,ni,nj->ij", weights, rows, rows)
                for weights, rows in ((left_weights, back), (right_weights, into))
            ]
            new += factors if known else [f / f.trace().sqrt() for f in factors]
        new += [g.square() for g in gradients[len(seen) :]]
        older = self.values or new
        self.values = [torch.lerp(a, b, share) for a, b in zip(new, older, strict=True)]

    def damped(self):
        """The factors, each with √λ times its mean eigenvalue."""
        return [
            f + self.damping**0.5 * f.trace() / len(f) * torch.eye(len(f)).double()
            for f in self.values[: 2 * len(self.layers)]
        ]

    def solve(self, vector):
        """One dense system for all parameters; their places are found by their names."""
        named = dict(self.model.named_parameters())
        place, at = {}, 0
        for p in named.values():
            place[id(p)] = torch.arange(at, at + p.numel()).view(p.shape)
            at += p.numel()
        matrix = torch.zeros(at, at, dtype=torch.float64)
        damped = iter(self.damped())
        for layer in self.layers:
            left, right = next(damped), next(damped)
            index = place[id(layer.weight)].flatten(1)
            if layer.bias is not None:
                index = torch.cat([index, place[id(layer.bias)][:, None]], 1)
            index = index.flatten()
            matrix[index[:, None], index] = torch.kron(left, right)
        diagonals = self.values[2 * len(self.layers) :]
        for p, value in zip(self.others, diagonals, strict=True):
            index = place[id(p)].flatten()
            matrix[index, index] = (value + self.damping**0.5 * value.mean()).flatten()
        return torch.linalg.solve(matrix, vector)


CASES = {
    "MLP": (mlp, lambda z: F.cross_entropy(z, torch.arange(N) % 3)),
    "CNN": (cnn, lambda z: F.cross_entropy(z, torch.arange(N) % 3)),
    "tied": (Tied, lambda z: F.mse_loss(z, torch.ones_like(z), reduction="sum")),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_steps_are_those_of_dense_matrices(name, decay, monkeypatch):
    monkeypatch.setattr(estimate, "_MOST_SKIPPED", 1)  # all rows count
    monkeypatch.setattr(stream, "_DECREMENTS", 2)
    make, loss = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    batches = [real(N, 4) for _ in range(4)]
    dense = Dense(model, damping=0.03)
    optimizer = KFAC(
        model.parameters(),
        lr=0.7,
        damping=0.03,
        renew_every=1,
        factor_decay=0.6,
        momentum=0.8,
        weight_decay=decay,
    )
    m, radius, last, last_slope = 0.0, optimizer.param_groups[0]["radius"], None, None
    decrement = None
    for t, x in enumerate(batches):
        closure = lambda x=x: loss(model(x))  # noqa: E731
        g = flatten(torch.autograd.grad(closure(), list(model.parameters())))
        dense.renew(closure, t, min(0.6, t / (t + 2)))
        m = 0.8 * m + 0.2 * g
        mean = 0.8 * m / (1 - 0.8 ** (t + 1)) + 0.2 * g
        solution = dense.solve(mean)
        now = (mean @ solution).item()
        average = now if last is None else (decrement + now) / 2  # of about two
        if last is not None:
            radius *= min(1, average / decrement)
            slope = g @ last / abs(last_slope)
            radius *= 2 ** (0.2 * 0.7 * (0.25 * 0.7 - slope).clamp(-1, 1).item())
        d = -0.7 * math.sqrt(2 * radius / (mean @ solution).item()) * solution
        expected = (1 - 0.7 * decay) * flatten(model.parameters()) + d
        last, last_slope, decrement = d, mean @ d, average
        optimizer.step(closure)
        assert_near(flatten(model.parameters()), expected, 1e-9)
        assert optimizer.param_groups[0]["radius"] == pytest.approx(radius, rel=1e-9)


def test_first_factors_are_those_of_the_preconditioner():
    """Where all rows are equally long, all estimates are the same."""
    x, y = F.normalize(real(N, 4), dim=1), real(N, 3)
    values = []
    for kind in (KFAC, NaturalCG):
        torch.manual_seed(0)
        model, scale = nn.Linear(4, 3).double(), nn.Parameter(torch.ones(3).double())
        params = [*model.parameters(), scale]
        options = {} if kind is KFAC else {"preconditioner": "kfac"}
        optimizer = kind(params, generator=seeded(), **options)
        optimizer.step(lambda: F.mse_loss(scale.detach() * model(x) + scale - 1, y))  # noqa: B023
        values.append([optimizer.state[p] for p in params])
    for p, one, other in zip(("weight", "bias", "scale"), *values, strict=True):
        for name in {"weight": ("left", "right"), "bias": (), "scale": ("diagonal",)}[p]:
            kept = one[name].flatten()  # NaturalCG's vectors are as long as any layer would need
            assert_near(kept, other[name].flatten()[: len(kept)], 1e-12)


class Table(nn.Module):
    """Tokens through an embedding, or as columns of the identity through a product."""

    def __init__(self, one_hot):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.head = nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 3)
        self.one_hot = one_hot

    def forward(self, tokens):
        if self.one_hot:
            ones = F.one_hot(tokens, 7).double() * (tokens != 2).unsqueeze(-1)
            constant = (self.weight[2] * (tokens == 2).unsqueeze(-1)).detach()
            return self.head(
                (ones.flatten(0, 1) @ self.weight)
                .view(*tokens.shape, 4)
                .add(constant)
                .tanh()
                .mean(1)
            )
        return self.head(F.embedding(tokens, self.weight, padding_idx=2).tanh().mean(1))


def test_an_embedding_is_a_product_with_columns_of_the_identity(monkeypatch):
    monkeypatch.setattr(estimate, "_MOST_SKIPPED", 1)
    ends = []
    for one_hot in (True, False):
        model = Table(one_hot).double()
        optimizer = KFAC(model.parameters(), renew_every=1)
        for step in range(4):
            tokens = torch.randint(0, 7, (N, 5), generator=seeded(step))
            optimizer.step(lambda: F.cross_entropy(model(tokens), tokens[:, 0] % 3))  # noqa: B023
        ends.append(flatten(model.parameters()))
    assert optimizer.state[model.weight]["layer_groups"] == 1
    assert optimizer.state[model.weight]["table"].any()
    assert optimizer.state[model.weight]["table"].shape == (7,)
    assert_near(ends[1], ends[0], 1e-9)
