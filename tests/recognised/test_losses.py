"""Closure form (a): the Gauss-Newton matrix of every recognised loss function, option by option."""

import inspect
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import real
from scipy.optimize import linprog
from torch import nn

from ngd_optim import NaturalCG, linearize
from ngd_optim.recognised import LOSSES, call_loss, irls_weight

N, C, T = 5, 4, 6
POSITIVE = torch.rand(N, C, dtype=torch.float64) + 0.5
REDUCTIONS = ["mean", "sum", "none"]


def labels(*shape):
    return torch.randint(0, C, shape or (N,))


def distribution():
    return real(N, C).softmax(-1)


# The table. A builder of a loss takes one value for each of its options, and gives: the shape of
# the output z, the loss as a function of z, and its matrix at z as another function of z. What is
# not reduced, the user averages.


def exact(plain):
    """The Hessian of the same loss in plain operations."""
    return lambda z: torch.autograd.functional.hessian(
        lambda flat: plain(flat.view_as(z)), z.flatten()
    )


def weighted_squares(coordinates, weights):
    """``Jᵤᵀ diag(h) Jᵤ``, the Hessian of ``½ Σ h (u − u₀)²``."""

    def matrix(z):
        jacobian = torch.autograd.functional.jacobian(
            lambda flat: coordinates(flat.view_as(z)).flatten(), z.flatten()
        )
        return jacobian.T @ (weights(z).reshape(-1, 1) * jacobian)

    return matrix


def mean_or_sum(values, reduction):
    return values.sum() if reduction == "sum" else values.mean()


def share(values, reduction):
    """The weight of each of these samples or elements."""
    return 1.0 if reduction == "sum" else 1 / values.numel()


def parabola(r):
    """Of ``|r|``, in loops: 1 over ``|r|``, or over a tenth of the lower median of those that are not zero."""
    sizes = sorted(abs(value) for value in r.flatten().tolist() if value)
    floor = 0.1 * sizes[(len(sizes) - 1) // 2] if sizes else 1.0
    values = [1 / max(abs(value), floor) for value in r.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).view(r.shape)


CLASSIFIED = {"vector": (C,), "rows": (N, C), "sequence": (2, C, 3), "image": (2, C, 2, 2)}


def classification(shape, kind, weight, smoothing):
    """The target for torch, target distributions along the last dimension, and the weight of each sample in a mean."""
    shape = CLASSIFIED[shape]
    samples = shape[:1] + shape[2:] if len(shape) > 1 else ()
    w = POSITIVE[0].clone() if weight else torch.ones(C, dtype=torch.float64)
    if weight == "some zero":
        w[:2] = 0
    if kind in ("distribution", "any mass"):
        soft = real(*samples, C).softmax(-1)
        if kind == "any mass":
            soft = soft * 3 * (torch.rand(*samples, 1) > 0.4)
        target, counts = soft.movedim(-1, 1) if samples else soft, torch.ones(samples)
    else:
        target = labels(*samples) if samples else labels(1)[0]
        ignored = {"ignored": torch.rand(samples) < 0.4, "all ignored": torch.ones(samples)}
        ignored = ignored.get(kind, torch.zeros(samples)).bool()
        soft = F.one_hot(target, C).double() * ~ignored.unsqueeze(-1)
        if not weight and samples and kind == "ignored":
            ignored.view(-1)[0] = False  # else the mean is 0/0
            soft = F.one_hot(target, C).double() * ~ignored.unsqueeze(-1)
        counts = w[target] * ~ignored
        target = target.masked_fill(ignored, -7)
    # An ignored sample has nothing to smooth; of probabilities torch smooths each row alike.
    mass = 1.0 if target.is_floating_point() else soft.sum(-1, keepdim=True)
    soft = w * ((1 - smoothing) * soft + smoothing * mass / C)
    return shape, target, soft, counts, w if weight else None


def plain_cross_entropy(soft, counts, reduction):
    def plain(z):
        log_p = (z if z.ndim == 1 else z.movedim(1, -1)).log_softmax(-1)
        per_sample = -(soft * log_p).sum(-1)
        if reduction == "mean":
            return per_sample.sum() / counts.sum()
        return per_sample.sum() if reduction == "sum" else per_sample.mean()

    return plain


def cross_entropy(shape, kind, weight, smoothing, reduction):
    shape, target, soft, counts, w = classification(shape, kind, weight, smoothing)
    keywords = {} if target.is_floating_point() else {"ignore_index": -7}
    return (
        shape,
        lambda z: F.cross_entropy(
            z, target, w, reduction=reduction, label_smoothing=smoothing, **keywords
        ),
        exact(plain_cross_entropy(soft, counts, reduction)),
    )


def linear_cross_entropy(kind, bias, in_chunks, reduction):
    """Its arguments are the output ``z``: the input, the layer's weight and its bias."""
    target, width, spatial = labels(N), 3, (2,) if kind == "several" else ()
    if kind == "several":
        target = labels(N, *spatial)
    elif kind == "ignored":
        target[0] = -100 if in_chunks else 1
    elif kind == "distribution":
        target = distribution()
    keywords = {"reduction": reduction}
    if kind == "ignored" and not in_chunks:
        keywords["ignore_index"] = 1
    if in_chunks:
        keywords["options"] = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    rows = C * 2 if spatial else C

    def parts(z):
        b = z[N + rows :].flatten()[:rows].view(C, *spatial) if bias else None
        return z[:N], z[N : N + rows].view(C, *spatial, width), b

    def call(z):
        x, w, b = parts(z)
        return F.linear_cross_entropy(x, w, target, linear_bias=b, **keywords)

    def logits(z):
        x, w, b = parts(z)
        out = torch.einsum("ni,c...i->nc...", x, w)
        return out if b is None else out + b

    def matrix(z):
        function = lambda flat: logits(flat.view_as(z)).flatten()  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(function, z.flatten())
        options = {name: value for name, value in keywords.items() if name != "options"}
        loss = lambda out: F.cross_entropy(out, target, **options).mean()  # noqa: E731
        return jacobian.T @ exact(loss)(logits(z)) @ jacobian

    return (N + rows + (3 if bias else 0), width), call, matrix


def nll_loss(shape, kind, weight, reduction):
    shape, target, soft, counts, w = classification(shape, kind, weight, 0.0)
    dim = min(1, len(shape) - 1)
    return (
        shape,
        lambda z: F.nll_loss(z.log_softmax(dim), target, w, ignore_index=-7, reduction=reduction),
        exact(plain_cross_entropy(soft, counts, reduction)),
    )


def kl_div(shape, dim, rows, log_target, reduction):
    target = real(*shape).softmax(dim)
    if rows != "distributions":
        factors = torch.rand(target.sum(dim, keepdim=True).shape, dtype=torch.float64) * 3
        target = target * factors * (factors > 1.5)  # some have no mass
    given = target.clamp(min=1e-300).log() if log_target else target
    scale = {"mean": 1 / target.numel(), "none": 1 / target.numel(), "batchmean": 1 / shape[0]}

    def plain(z):
        return -scale.get(reduction, 1.0) * (target * z.log_softmax(dim)).sum()

    def call(z):
        return F.kl_div(z.log_softmax(dim), given, reduction=reduction, log_target=log_target)

    return shape, call, exact(plain)


def binary_cross_entropy(weight, reduction):
    y, w = distribution(), POSITIVE if weight else None
    scale = 1 if w is None else w

    def h(z):
        p = z.sigmoid()
        return share(z, reduction) * scale * (y / p**2 + (1 - y) / (1 - p) ** 2)

    def call(z):
        return F.binary_cross_entropy(z.sigmoid(), y, w, reduction=reduction)

    return (N, C), call, weighted_squares(torch.sigmoid, h)


def binary_cross_entropy_with_logits(weight, pos_weight, reduction):
    y, w = distribution(), POSITIVE if weight else None
    q = POSITIVE[0] if pos_weight else None

    def plain(z):
        p = z.sigmoid()
        values = -((1 if q is None else q) * y * p.log() + (1 - y) * (1 - p).log())
        return mean_or_sum(values * (1 if w is None else w), reduction)

    def call(z):
        return F.binary_cross_entropy_with_logits(z, y, w, pos_weight=q, reduction=reduction)

    return (N, C), call, exact(plain)


def mse_loss(reduction):
    y = real(N, C)

    def call(z):
        return F.mse_loss(z, y, reduction=reduction)

    return (N, C), call, exact(lambda z: mean_or_sum((z - y) ** 2, reduction))


def poisson_nll_loss(log_input, full, reduction):
    y = real(N, C).exp().round()
    rate = (lambda z: z.exp()) if log_input else (lambda z: z.square() + 0.5)

    def call(z):
        z = z if log_input else rate(z)
        return F.poisson_nll_loss(z, y, log_input=log_input, full=full, reduction=reduction)

    if log_input:
        return (N, C), call, exact(lambda z: mean_or_sum(z.exp() - y * z, reduction))

    def h(z):
        return share(z, reduction) * y / (rate(z) + 1e-8) ** 2

    return (N, C), call, weighted_squares(rate, h)


def soft_margin_loss(reduction):
    y = real(N, C).sign()

    def call(z):
        return F.soft_margin_loss(z, y, reduction=reduction)

    return (N, C), call, exact(lambda z: mean_or_sum((1 + (-y * z).exp()).log(), reduction))


def multilabel_soft_margin_loss(weight, reduction):
    y, w = (real(N, C) > 0).double(), POSITIVE[0] if weight else None

    def plain(z):
        values = -(y * z.sigmoid().log() + (1 - y) * (-z).sigmoid().log())
        return mean_or_sum((values * (1 if w is None else w)).mean(-1), reduction)

    def call(z):
        return F.multilabel_soft_margin_loss(z, y, w, reduction=reduction)

    return (N, C), call, exact(plain)


def gaussian_nll_loss(form, full, reduction):
    """The Fisher information of a normal: 1/σ² in the mean, 1/(2σ⁴) in the variance."""
    width = {"full": C, "column": 1, "short": 1}.get(form, 0)
    y = real(N, C)
    fixed = {"number": 0.7, "fixed": POSITIVE}.get(form)

    def variance(z):
        return z[:, C:].exp() + 1e-3

    def call(z):
        var = variance(z) if fixed is None else fixed
        var = var.squeeze(-1) if form == "short" else var
        return F.gaussian_nll_loss(z[:, :C], y, var, full=full, reduction=reduction)

    def coordinates(z):
        return torch.cat([z[:, :C], variance(z).expand(N, C)]) if width else z

    def h(z):
        var = (
            variance(z).expand(N, C)
            if width
            else torch.as_tensor(fixed, dtype=z.dtype).expand(N, C)
        )
        both = torch.cat([1 / var, 1 / (2 * var**2)]) if width else 1 / var
        return share(y, reduction) * both

    return (N, C + width), call, weighted_squares(coordinates, h)


def cosine_embedding_loss(shape, margin, reduction):
    """Least squares of unit vectors for a match, the parabola of a hinge for a mismatch."""
    target = torch.tensor([1, 1, 1, -1, -1]) if len(shape) == 3 else torch.tensor(1)

    def call(z):
        return F.cosine_embedding_loss(*z, target, margin=margin, reduction=reduction)

    def difference(z):
        return F.normalize(z[0], dim=-1) - F.normalize(z[1], dim=-1)

    def cosine(z):
        return F.cosine_similarity(z[0], z[1], dim=-1)

    def of_matches(z):
        weights = share(target, reduction) * (target > 0).double()
        return weights.unsqueeze(-1).expand_as(z[0])

    def of_mismatches(z):
        gap = (cosine(z) - margin) * (target < 0)
        return share(target, reduction) * parabola(gap) / 2 * (target < 0)

    parts = [weighted_squares(difference, of_matches), weighted_squares(cosine, of_mismatches)]
    return shape, call, lambda z: sum(part(z) for part in parts)


def ctc_loss(form, zero_infinity, reduction):
    """The Fisher information of the frames of samples that have an alignment."""
    batch = 1 if form == "one" else N
    targets = torch.tensor([[1, 1, 1], [1, 2, 3], [2, 0, 0], [3, 3, 0], [1, 1, 1]])[:batch]
    sizes, lengths = torch.tensor([3, 3, 1, 2, 3]), torch.tensor([6, 6, 5, 6, 5])
    if zero_infinity:
        lengths[0] = 4  # three equal labels take five frames
    sizes, lengths = sizes[:batch], lengths[:batch]
    possible = torch.ones(batch, dtype=torch.float64)
    possible[0] = 0.0 if zero_infinity else 1.0
    given = targets[0, : sizes[0]] if form == "one" else targets
    if form == "joined":
        given = torch.cat([row[:size] for row, size in zip(targets, sizes, strict=True)])
    ends = (lengths[0], sizes[0]) if form == "one" else (lengths, sizes)

    def call(z):
        return F.ctc_loss(
            z.log_softmax(-1), given, *ends, zero_infinity=zero_infinity, reduction=reduction
        )

    scale = possible / batch
    scale = {"mean": scale / sizes, "sum": possible}.get(reduction, scale)
    seen = (torch.arange(T).unsqueeze(1) < lengths) * scale

    def matrix(z):
        p = z.reshape(-1, C).softmax(-1)
        blocks = [
            weight * (row.diag() - row.outer(row))
            for weight, row in zip(seen.flatten().double(), p, strict=True)
        ]
        return torch.block_diag(*blocks)

    return (T, C) if form == "one" else (T, N, C), call, matrix


def l1_loss(both, reduction):
    y = real(N, C)
    residual = (lambda z: z[0] - z[1]) if both else (lambda z: z - y)

    def call(z):
        return F.l1_loss(*(z if both else (z, y)), reduction=reduction)

    def h(z):
        return share(y, reduction) * parabola(residual(z))

    return (2, N, C) if both else (N, C), call, weighted_squares(residual, h)


def huber_loss(delta, weight, reduction):
    y = real(N, C)
    keywords = {"weight": POSITIVE} if weight else {}

    def call(z):
        return F.huber_loss(z, y, delta=delta, reduction=reduction, **keywords)

    def h(z):
        ratio = (delta / (z - y).abs()).clamp(max=1.0)
        return share(y, reduction) * ratio * (POSITIVE if weight else 1.0)

    return (N, C), call, weighted_squares(lambda z: z - y, h)


def smooth_l1_loss(beta, reduction):
    y = real(N, C)

    def call(z):
        return F.smooth_l1_loss(z, y, beta=beta, reduction=reduction)

    def h(z):
        r = z - y
        return share(y, reduction) * (1 / r.abs().clamp(min=beta) if beta else parabola(r))

    return (N, C), call, weighted_squares(lambda z: z - y, h)


def margin_ranking_loss(shape, margin, reduction):
    y = real(*shape[1:]).sign()

    def call(z):
        return F.margin_ranking_loss(*z, y, margin, reduction=reduction)

    def gap(z):
        return margin - y * (z[0] - z[1])

    def h(z):
        return share(y, reduction) * parabola(gap(z)) / 2

    return shape, call, weighted_squares(gap, h)


def hinge_embedding_loss(margin, reduction):
    y = real(N, C).sign()

    def call(z):
        return F.hinge_embedding_loss(z, y, margin, reduction=reduction)

    def h(z):
        matches = parabola(z * (y == 1)) * (y == 1)
        return share(y, reduction) * (matches + parabola((margin - z) * (y == -1)) / 2 * (y == -1))

    return (N, C), call, weighted_squares(lambda z: z, h)


def multi_margin_loss(shape, p, margin, weight, reduction):
    target = labels(N) if len(shape) == 2 else labels(1)[0]
    rows = target.reshape(-1).tolist()
    w = POSITIVE[0] if weight else torch.ones(C, dtype=torch.float64)
    scale = share(target, reduction) / C
    pairs = [(n, y, i) for n, y in enumerate(rows) for i in range(C) if i != y]

    def call(z):
        return F.multi_margin_loss(z, target, p, margin, w if weight else None, reduction=reduction)

    def gaps(z):
        z = z.reshape(-1, C)
        return torch.stack([margin - z[n, y] + z[n, i] for n, y, i in pairs])

    def h(z):
        of_pair = scale * torch.stack([w[y] for _, y, _ in pairs])
        return of_pair * (parabola(gaps(z)) / 2 if p == 1 else 2.0 * (gaps(z) > 0))

    return shape, call, weighted_squares(gaps, h)


def multilabel_margin_loss(shape, reduction):
    target = torch.tensor(
        [[1, 0, -1, 2], [3, -1, -1, -1], [-1, 1, 2, 3], [0, 1, 2, -1], [2, 2, 3, -1]]
    )
    target = target if len(shape) == 2 else target[0]
    lists = [row[: ([*row.tolist(), -1]).index(-1)].tolist() for row in target.reshape(-1, C)]
    pairs = [(n, j, i) for n, y in enumerate(lists) for j in y for i in range(C) if i not in y]

    def call(z):
        return F.multilabel_margin_loss(z, target, reduction=reduction)

    def gaps(z):
        z = z.reshape(-1, C)
        return torch.stack([1 - z[n, j] + z[n, i] for n, j, i in pairs])

    scale = (1.0 if reduction == "sum" else 1 / len(lists)) / C
    return shape, call, weighted_squares(gaps, lambda z: scale * parabola(gaps(z)) / 2)


def triplet_gap(z, margin, swap, distance):
    near, far = distance(z[0], z[1]), distance(z[0], z[2])
    return margin + near - (torch.minimum(far, distance(z[1], z[2])) if swap else far)


def triplet_margin_loss(shape, margin, p, swap, reduction):
    def call(z):
        return F.triplet_margin_loss(*z, margin=margin, p=p, swap=swap, reduction=reduction)

    def gap(z):
        return triplet_gap(
            z, margin, swap, lambda a, b: ((a - b + 1e-6).abs() ** p).sum(-1) ** (1 / p)
        )

    return (
        shape,
        call,
        weighted_squares(gap, lambda z: share(gap(z), reduction) * parabola(gap(z)) / 2),
    )


def triplet_margin_with_distance_loss(distance, margin, swap, reduction):
    function = {
        "squared": lambda a, b: (a - b).square().sum(-1),
        "cosine": lambda a, b: 1 - F.cosine_similarity(a, b),
        "default": None,
    }[distance]

    def call(z):
        return F.triplet_margin_with_distance_loss(
            *z, distance_function=function, margin=margin, swap=swap, reduction=reduction
        )

    def gap(z):
        return triplet_gap(
            z, margin, swap, function or (lambda a, b: (a - b + 1e-6).square().sum(-1).sqrt())
        )

    def h(z):
        return share(gap(z), reduction) * parabola(gap(z)) / 2

    return (3, N, C), call, weighted_squares(gap, h)


WITH_BATCHMEAN = [*REDUCTIONS, "batchmean"]
YES_NO = [False, True]
TABLE = {
    cross_entropy: [
        CLASSIFIED,
        ["labels", "ignored", "distribution", "any mass"],
        [None, "positive"],
        [0.0, 0.1],
        REDUCTIONS,
    ],
    linear_cross_entropy: [
        ["labels", "ignored", "several", "distribution"],
        YES_NO,
        [False],
        REDUCTIONS,
    ],
    nll_loss: [
        CLASSIFIED,
        ["labels", "ignored"],
        [None, "positive"],
        REDUCTIONS,
    ],
    kl_div: [
        [(N, C)],
        [0, 1],
        ["distributions", "masses"],
        YES_NO,
        WITH_BATCHMEAN,
    ],
    binary_cross_entropy: [YES_NO, REDUCTIONS],
    binary_cross_entropy_with_logits: [YES_NO, YES_NO, REDUCTIONS],
    mse_loss: [REDUCTIONS],
    poisson_nll_loss: [YES_NO, YES_NO, REDUCTIONS],
    soft_margin_loss: [REDUCTIONS],
    multilabel_soft_margin_loss: [YES_NO, REDUCTIONS],
    gaussian_nll_loss: [["full", "column", "short", "fixed", "number"], YES_NO, REDUCTIONS],
    cosine_embedding_loss: [[(2, N, C), (2, C)], [0.0, 0.1], REDUCTIONS],
    ctc_loss: [["padded", "joined", "one"], YES_NO, REDUCTIONS],
    l1_loss: [YES_NO, REDUCTIONS],
    huber_loss: [[0.3, 1.0], YES_NO, REDUCTIONS],
    smooth_l1_loss: [[0.0, 0.3, 1.0], REDUCTIONS],
    margin_ranking_loss: [[(2, N), (2, N, C)], [0.0, 0.5], REDUCTIONS],
    hinge_embedding_loss: [[0.3, 1.0], REDUCTIONS],
    multi_margin_loss: [[(C,), (N, C)], [1, 2], [0.3, 1.0], YES_NO, REDUCTIONS],
    multilabel_margin_loss: [[(C,), (N, C)], REDUCTIONS],
    triplet_margin_loss: [[(3, C), (3, N, C)], [1.0, 3.0], [1, 2, 3], YES_NO, REDUCTIONS],
    triplet_margin_with_distance_loss: [
        ["default", "squared", "cosine"],
        [1.0],
        YES_NO,
        REDUCTIONS,
    ],
}
MORE = [
    *product(
        [kl_div], [(2, C, 3), (2, 3, C), (2, C, 2, 2), (C,)], [-1], ["masses"], [False], ["sum"]
    ),
    *product([kl_div], [(2, C, 3), (2, C, 2, 2)], [1], ["masses"], [False], WITH_BATCHMEAN),
    *product([cross_entropy], CLASSIFIED, ["all ignored"], [None], [0.0, 0.1], ["sum", "none"]),
    *product([nll_loss], CLASSIFIED, ["all ignored"], [None, "positive"], ["sum", "none"]),
    *product([nll_loss], ["image"], ["labels"], ["some zero"], REDUCTIONS),
    *product([linear_cross_entropy], ["labels", "ignored"], YES_NO, [True], REDUCTIONS),
    *product([cross_entropy], ["image"], ["labels"], ["some zero"], [0.0, 0.1], REDUCTIONS),
]
CASES = [(builder, *row) for builder, options in TABLE.items() for row in product(*options)] + MORE


def name_of(case):
    return "-".join(getattr(part, "__name__", str(part)) for part in case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_each_option_of_each_loss_has_its_matrix(case):
    """``JᵀHJ`` by products, against the dense matrix at the output; and the gradient against plain autograd's."""
    builder, *options = case
    if (
        builder is huber_loss
        and options[1]
        and "weight" not in inspect.signature(F.huber_loss).parameters
    ):
        pytest.skip("this torch has no weights there")
    if not hasattr(F, builder.__name__):
        pytest.skip("this torch does not have it")
    shape, call, matrix_at = builder(*options)
    theta = nn.Parameter(real(6))
    size = torch.Size(shape).numel()
    mixing, offset = real(size, 6), real(size)

    def output():
        return (mixing @ theta + offset).tanh().mul(1.5).view(shape)

    def closure():
        return call(output()).mean()

    z = output().detach().flatten()
    jacobian = (1.5 - z**2 / 1.5).unsqueeze(1) * mixing
    point = linearize(closure, [theta])
    found = torch.stack([point.curvature(e) for e in torch.eye(6, dtype=torch.float64)])
    right = jacobian.T @ matrix_at(z.view(shape)).double() @ jacobian
    assert (found - right).norm() <= 1e-8 * right.norm()
    assert torch.linalg.eigvalsh((found + found.T) / 2).min() >= -1e-12 * found.norm()
    (plain,) = torch.autograd.grad(closure(), theta)
    assert (point.gradient - plain).norm() <= 1e-11 * plain.norm()
    assert abs(point.loss - closure()) <= 1e-12 * (1 + abs(closure()))


def test_the_table_has_every_recognised_loss():
    names = {builder.__name__ for builder in TABLE}
    own = {"least_squares", "variational_energy"}  # which have tests of their own
    assert {name for name in names if hasattr(F, name)} == {f.__name__ for f in LOSSES} - own


FLAGS = [(None, True, "mean"), (False, None, "sum"), (False, True, "sum"), (True, False, "none")]
WITH_FLAGS = {
    F.binary_cross_entropy: lambda z: (z.sigmoid(), POSITIVE / 2),
    F.cosine_embedding_loss: lambda z: (z, POSITIVE, torch.ones(N)),
    F.cross_entropy: lambda z: (z, torch.arange(N) % C),
    F.hinge_embedding_loss: lambda z: (z, (POSITIVE - 1).sign()),
    F.kl_div: lambda z: (z.log_softmax(-1), POSITIVE),
    F.l1_loss: lambda z: (z, POSITIVE),
    F.margin_ranking_loss: lambda z: (z, POSITIVE, torch.ones(N, C)),
    F.multi_margin_loss: lambda z: (z, torch.arange(N) % C),
    F.multilabel_margin_loss: lambda z: (z, torch.tensor([[1, -1, 0, 0]]).expand(N, C)),
    F.nll_loss: lambda z: (z.log_softmax(-1), torch.arange(N) % C),
    F.smooth_l1_loss: lambda z: (z, POSITIVE),
    F.triplet_margin_loss: lambda z: (z, POSITIVE, POSITIVE.flip(0)),
}


def matrix_of(call, z):
    """The curvature of ``call(z)`` in ``z``, by products, where outputs are the parameters themselves."""
    parameter = nn.Parameter(z)
    point = linearize(lambda: call(parameter).mean(), [parameter])
    return torch.stack([point.curvature(e) for e in torch.eye(z.numel(), dtype=z.dtype)])


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("function", WITH_FLAGS, ids=lambda f: f.__name__)
def test_old_flags_mean_what_reduction_means(function, flags):
    size_average, reduce, reduction = flags
    z, arguments = real(N, C), WITH_FLAGS[function]
    old = matrix_of(lambda z: function(*arguments(z), size_average=size_average, reduce=reduce), z)
    new = matrix_of(lambda z: function(*arguments(z), reduction=reduction), z)
    assert torch.equal(old, new)
    assert new.norm() > 0


class TestWithoutLoss:
    """Where there is no loss there is no curvature; and nothing but the loss itself is ever NaN or infinite."""

    @staticmethod
    def curvature(function, z, *args, **kwargs):
        """At ``z``; the gradient is finite."""
        z = z.clone().requires_grad_()
        call = call_loss(function, (z, *args), kwargs)
        loss, outputs = call.with_own_hessian(None), [u for u in call.outputs if u.requires_grad]
        gradients = torch.autograd.grad(loss.sum(), outputs, create_graph=True)
        assert all(g.isfinite().all() for g in gradients)
        curvature = torch.autograd.grad(gradients, outputs, [torch.ones_like(u) for u in outputs])
        assert all(c.isfinite().all() for c in curvature)
        return curvature[0]

    @pytest.mark.parametrize("function", [F.cross_entropy, F.nll_loss])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_all_targets_ignored(self, function, reduction):
        z, target = real(2, C, 3).log_softmax(1), torch.full((2, 3), -100)
        assert not self.curvature(function, z, target, reduction=reduction).any()

    def test_classes_without_weight(self):
        z, weight = real(N, C).log_softmax(1), torch.zeros(C, dtype=torch.float64)
        for reduction in ("sum", "none"):
            for function in (F.cross_entropy, F.nll_loss):
                found = self.curvature(function, z, labels(), weight, reduction=reduction)
                assert not found.any()

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_targets_that_no_alignment_fits(self, reduction):
        z = real(3, 2, C).log_softmax(-1)
        targets, lengths = torch.tensor([[1, 1, 1], [2, 2, 2]]), torch.tensor([3, 3])
        found = self.curvature(
            F.ctc_loss, z, targets, lengths, lengths, zero_infinity=True, reduction=reduction
        )
        assert not found.any()

    def test_classes_that_are_masked(self):
        z = real(N, C)
        z[:, 2] = -torch.inf
        for log_p in (z.log_softmax(1), z.log_softmax(1).float()):
            y = torch.tensor([0, 1, 3, 0, 1])
            loss = call_loss(F.nll_loss, (log_p.requires_grad_(), y), {}).with_own_hessian(None)
            assert loss == F.nll_loss(log_p, y)
            assert not self.curvature(F.nll_loss, log_p.detach(), y)[:, 2].any()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_extreme_outputs(self, dtype):
        p = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype)
        y = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=dtype)
        far = torch.tensor([-60.0, 60.0, -1e4, 1e4], dtype=dtype)
        for function, z in (
            (F.binary_cross_entropy, p),
            (F.binary_cross_entropy_with_logits, far),
            (F.multilabel_soft_margin_loss, far),
            (F.l1_loss, y),  # no residual at all
            (F.smooth_l1_loss, far),
            (F.huber_loss, far),
            (F.hinge_embedding_loss, far),
            (F.nll_loss, far[None]),
            (F.cross_entropy, far[None]),
            (F.multi_margin_loss, far[None]),
        ):
            if dtype == torch.bfloat16 and function is F.multi_margin_loss:
                continue  # torch has no kernel
            target = torch.tensor([2]) if z.ndim == 2 else y
            assert (self.curvature(function, z, target) >= -1e-6).all(), function.__name__

    def test_vectors_of_length_zero(self):
        zero, one = torch.zeros(2, C, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        self.curvature(F.cosine_embedding_loss, zero, zero + 1, one)
        self.curvature(F.triplet_margin_loss, zero, zero, zero + 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div])
def test_a_learned_target_keeps_its_gradient(function, reduction):
    z, y = nn.Parameter(real(N, C)), nn.Parameter(real(N, C))
    weights = POSITIVE if reduction == "none" else 1.0

    def closure():
        x, target = (z.log_softmax(1), y.softmax(1)) if function is F.kl_div else (z, y)
        return (function(x, target, reduction=reduction) * weights).sum()

    plain = torch.cat([g.flatten() for g in torch.autograd.grad(closure(), [z, y])])
    assert (linearize(closure, [z, y]).gradient - plain).norm() <= 1e-12 * plain.norm()


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("function", [F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div])
def test_a_target_may_be_broadcast(function):
    y = POSITIVE[:1]
    for reduction in REDUCTIONS:
        small = matrix_of(lambda z, r=reduction: function(z, y, reduction=r), -POSITIVE)
        full = matrix_of(lambda z, r=reduction: function(z, y.expand(N, C), reduction=r), -POSITIVE)
        assert (small - full).norm() <= 1e-12 * full.norm()


@pytest.mark.parametrize("function", [F.triplet_margin_loss, F.triplet_margin_with_distance_loss])
def test_a_margin_that_torch_refuses_is_refused(function):
    with pytest.raises(ValueError, match="margin must be greater than 0, got -1"):
        matrix_of(lambda z: function(z, POSITIVE, POSITIVE, margin=-1.0), real(N, C))


class TestMajoriser:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_weights_are_finite(self, dtype):
        for r in ([0.0, 0.0], [3.0], [0.0, -2.0, 1e-30], [1e-38, 1.0, 1.0], []):
            weights = irls_weight(torch.tensor(r, dtype=dtype))
            assert weights.isfinite().all()
            assert (weights > 0).all()

    @pytest.mark.parametrize("slope", [1.0, 0.5])
    def test_the_parabola_lies_above_and_touches(self, slope):
        """c|r| ≤ c|r₀| + c sign(r₀) (r − r₀) + ½ h (r − r₀)², above the floor."""
        start = torch.tensor([-2.0, -1.0, 0.5, 1.0, 3.0], dtype=torch.float64).unsqueeze(1)
        r = torch.linspace(-5, 5, 1001, dtype=torch.float64)
        change = r - start
        tangent = slope * (start.abs() + start.sign() * change)
        gap = tangent + 0.5 * irls_weight(start, slope) * change**2 - slope * r.abs()
        assert (gap >= -1e-12).all()
        assert (gap.amin(1) < 1e-4).all()


LINEAR = {
    "l1_loss": lambda z: F.l1_loss(z, LINEAR_TARGETS),
    "multi_margin_loss": lambda z: F.multi_margin_loss(z, LINEAR_LABELS),
    "multilabel_margin_loss": lambda z: F.multilabel_margin_loss(z, LINEAR_LISTS),
    "margin_ranking_loss": lambda z: F.margin_ranking_loss(
        z[:20], z[20:], LINEAR_TARGETS[:20].sign(), 0.5
    ),
}
LINEAR_TARGETS = real(40, 3)
LINEAR_LABELS = torch.randint(0, 3, (40,))
LINEAR_LISTS = torch.stack([LINEAR_LABELS, *[-torch.ones_like(LINEAR_LABELS)] * 2], 1)


@pytest.mark.parametrize("name", LINEAR)
def test_kinks_are_no_place_to_stay(name):
    """A linear model: the minimum is that of a linear program, within 1 % of what is to be gained."""
    x, loss = real(40, 4), LINEAR[name]
    model = nn.Linear(4, 3).double()
    first = loss(model(x)).item()
    optimizer = NaturalCG(model.parameters())
    for _ in range(50):
        optimizer.step(lambda: loss(model(x)))
    best = minimum_of_convex(lambda weights: loss(x @ weights[:4] + weights[4]), (5, 3))
    assert loss(model(x)).item() <= best + 0.01 * (first - best)


def minimum_of_convex(function, shape):
    """By cutting planes (Kelley 1960): ``f(w) ≥ f(wₖ) + gₖᵀ(w − wₖ)`` at more and more points, in a box."""
    size = torch.Size(shape).numel()
    rows, bounds, w = [], [], torch.zeros(size, dtype=torch.float64)
    best = float("inf")
    for _ in range(400):
        w.requires_grad_()
        value = function(w.view(shape))
        (gradient,) = torch.autograd.grad(value, w)
        best = min(best, value.item())
        rows.append([*gradient.tolist(), -1.0])
        bounds.append((gradient @ w.detach() - value.detach()).item())
        result = linprog([0.0] * size + [1.0], rows, bounds, bounds=[(-3, 3)] * size + [(0, None)])
        if best - result.fun <= 1e-3 * best:
            break
        w = torch.tensor(result.x[:size], dtype=torch.float64)
    return best


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)).double()


class TestSeveralLosses:
    def test_added_and_weighted(self, model):
        x, y, t, params = real(N, 3), labels(), real(N, C), list(model.parameters())

        def total():
            z = model(x)
            return F.cross_entropy(z, y) + 0.3 * F.mse_loss(z.tanh(), t)

        parts = [
            linearize(lambda: F.cross_entropy(model(x), y), params),
            linearize(lambda: 0.3 * F.mse_loss(model(x).tanh(), t), params),
        ]
        v = real(sum(p.numel() for p in params))
        expected = sum(part.curvature(v) for part in parts)
        assert (linearize(total, params).curvature(v) - expected).norm() <= 1e-12 * expected.norm()

    def test_weight_penalty_keeps_its_hessian(self, model):
        x, y, params = real(N, 3), labels(), list(model.parameters())
        v = real(sum(p.numel() for p in params))
        plain = linearize(lambda: F.cross_entropy(model(x), y), params)
        penalised = linearize(
            lambda: (
                F.cross_entropy(model(x), y)
                + 0.05 * sum(p.square().sum() for p in model.parameters())
            ),
            params,
        )
        expected = plain.curvature(v) + 0.1 * v
        assert (penalised.curvature(v) - expected).norm() <= 1e-12 * expected.norm()

    def test_penalty_with_negative_curvature_acts_by_its_gradient_alone(self, model, caplog):
        x, y, params = real(N, 3), labels(), list(model.parameters())
        v = real(sum(p.numel() for p in params))
        plain = linearize(lambda: F.cross_entropy(model(x), y), params)

        def closure():
            return F.cross_entropy(model(x), y) + sum(
                (p.square() - 1).square().sum() for p in model.parameters()
            )

        with caplog.at_level("INFO", logger="ngd_optim"):
            penalised = linearize(closure, params)
        assert torch.equal(penalised.curvature(v), plain.curvature(v))
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(closure(), params)])
        assert (penalised.gradient - expected).norm() <= 1e-12 * expected.norm()
        assert "negative curvature" in caplog.text

    def test_absolute_penalty_has_no_hessian(self, model):
        x, y, params = real(N, 3), labels(), list(model.parameters())
        optimizer = NaturalCG(params)
        optimizer.step(
            lambda: (
                F.cross_entropy(model(x), y) + 1e-3 * sum(p.abs().sum() for p in model.parameters())
            )
        )
        assert optimizer.last_step.accepted
