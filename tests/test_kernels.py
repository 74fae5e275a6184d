"""Kernels that can be differentiated twice: the same numbers, for one thread, and nothing left changed."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from ngd_optim import NaturalCG, linearize
from ngd_optim.autograd_graph import nodes
from ngd_optim.kernels import DifferentiableKernels, WhileNeeded

MASKS = {
    "none": None,
    "causal": None,
    "bool": torch.ones(5, 7, dtype=torch.bool).tril(2),
    "float": torch.linspace(-1, 1, 35).view(5, 7),
}


def switches() -> dict[str, bool]:
    """What torch keeps for the whole process."""
    b = torch.backends
    return {
        "mkldnn": b.mkldnn.enabled,
        "cudnn": b.cudnn.enabled,
        "flash": b.cuda.flash_sdp_enabled(),
        "efficient": b.cuda.mem_efficient_sdp_enabled(),
        "math": b.cuda.math_sdp_enabled(),
        "compiler": torch.utils._python_dispatch.is_in_torch_dispatch_mode(),
    }


def drawn_alike(function, kernels) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with kernels:
        return [*function(), torch.rand(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_is_that_of_the_math_backend(dtype, mask, groups, dropout, autocast):
    query = torch.randn(2, 4, 5, 8, dtype=dtype)
    key, value = (torch.randn(2, 4 // groups, 7, 8, dtype=dtype) for _ in range(2))
    given = MASKS[mask]
    given = given.to(dtype) if given is not None and given.is_floating_point() else given
    options = {"is_causal": mask == "causal", "scale": 0.3 * groups, "enable_gqa": groups > 1}

    def attend():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            yield F.scaled_dot_product_attention(query, key, value, given, dropout, **options)

    expected = drawn_alike(attend, sdpa_kernel(SDPBackend.MATH))
    found = drawn_alike(attend, DifferentiableKernels())
    assert all(map(torch.equal, found, expected))
    assert found[0].dtype == expected[0].dtype


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("needs_weights", [False, True])
def test_attention_inside_another_function(trains, needs_weights):
    attention = nn.MultiheadAttention(8, 2, dropout=0.2).train(trains)
    x = torch.randn(3, 5, 8)

    def attend():
        return attention(x, x, x, need_weights=needs_weights)[:1]

    found = drawn_alike(attend, DifferentiableKernels())
    assert all(map(torch.equal, found, drawn_alike(attend, sdpa_kernel(SDPBackend.MATH))))
    assert not any("ScaledDotProduct" in node.name() for node in nodes(found[:1]))


SHAPES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "projected": {"proj_size": 2},
    "float64": {"dtype": torch.float64},
}


LAYERS = [
    (kind, shape)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for shape in SHAPES
    if shape != "projected" or kind is nn.LSTM  # which alone has them
]


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_layers_are_the_native_ones(kind, shape, packed, layers, both):
    options = SHAPES[shape]
    layer = kind(3, 4, layers, bidirectional=both, dropout=0.3 * (layers > 1), **options)
    dtype = options.get("dtype")
    sequences = [torch.randn(n, 3, dtype=dtype) for n in (5, 4, 4, 2)]
    x = pack_sequence(sequences) if packed else torch.randn(3, 4, 3, dtype=dtype)

    def run():
        out, last = layer(x)
        return out if isinstance(out, torch.Tensor) else out.data, *last

    for autocast in (False, dtype is None):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            native = torch.backends.mkldnn.flags(enabled=False)
            found = drawn_alike(run, DifferentiableKernels())
            assert all(map(torch.equal, found, drawn_alike(run, native)))
    assert torch.backends.mkldnn.enabled


def test_lstm_takes_arguments_by_name():
    layer, x, zeros = nn.LSTM(3, 4), torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    names = ("has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
    options = dict(zip(names, (True, 1, 0.0, True, False, False), strict=True))
    with DifferentiableKernels():
        found = torch.lstm(input=x, hx=(zeros, zeros), params=list(layer.parameters()), **options)
    torch.testing.assert_close(found[0], layer(x)[0])


class TestWhileNeeded:
    def counted(self):
        log = []

        class Turned:
            def __enter__(self):
                log.append("on")

            def __exit__(self, *_):
                log.append("off")

        return WhileNeeded(Turned), log

    def test_nested(self):
        switch, log = self.counted()
        with switch, switch:
            assert log == ["on"]
        assert log == ["on", "off"]

    def test_overlapping_in_two_threads(self):
        switch, log = self.counted()
        entered, left = threading.Event(), threading.Event()

        def other():
            with switch:
                entered.set()
                left.wait()

        thread = threading.Thread(target=other)
        with switch:
            thread.start()
            entered.wait()
        assert log == ["on"]  # the other still needs it
        left.set()
        thread.join()
        assert log == ["on", "off"]

    def test_is_put_back_after_an_error(self):
        switch, log = self.counted()
        with pytest.raises(KeyError), switch:
            raise KeyError
        assert log == ["on", "off"]


def test_threads_leave_the_switches_of_the_process_alone():
    before, seen, stop = switches(), [], threading.Event()

    def train(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, t = (torch.randn(4, 5, 4, generator=generator) for _ in range(2))
        core, attention = nn.LSTM(4, 4, batch_first=True), nn.MultiheadAttention(4, 2)
        optimizer = NaturalCG([*core.parameters(), *attention.parameters()])

        def closure():
            h = core(x)[0]
            return F.mse_loss(attention(h, h, h, need_weights=False)[0], t)

        for _ in range(3):
            optimizer.step(closure)

    def look() -> None:
        while not stop.wait(0.0005):
            seen.append(switches())

    watcher = threading.Thread(target=look)
    watcher.start()
    threads = [threading.Thread(target=train, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert switches() == before
    assert seen
    assert all(one == before for one in seen)


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_products_after_linearize_recompute_checkpoints_alike(kind):
    torch.manual_seed(0)
    x, t = torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    core = nn.LSTM(4, 4) if kind == "lstm" else nn.MultiheadAttention(4, 2)

    def run(x):
        return core(x)[0] if kind == "lstm" else core(x, x, x, need_weights=False)[0]

    plain = linearize(lambda: F.mse_loss(run(x), t), core.parameters())
    point = linearize(
        lambda: F.mse_loss(checkpoint(run, x, use_reentrant=False), t), core.parameters()
    )
    v = torch.randn_like(point.gradient)
    torch.testing.assert_close(point.curvature(v), plain.curvature(v))
    torch.testing.assert_close(point.diagonal(), plain.diagonal())
