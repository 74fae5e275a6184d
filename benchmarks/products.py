"""The cost of one Gauss-Newton product ÷ the cost of one loss gradient, beside other ways to form it.

    python benchmarks/products.py

Writes results/products.json, .md and .png. One thread, and an allocator that keeps large blocks (MALLOC_TRIM_THRESHOLD_
and MALLOC_MMAP_THRESHOLD_ at 2³⁰, which the script sets by starting itself again).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator
from matplotlib.figure import Figure
from models import MODELS
from timing import interleaved, keep_memory, machine, ratios
from torch import Tensor, nn
from torch.func import functional_call, jvp, linearize, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmin.function import ScalarFunction

import ngd_optim
from ngd_optim.curvature import Graph
from ngd_optim.distributed import ALONE
from ngd_optim.linearization import linearize_mean
from ngd_optim.linearization.backend import Way
from ngd_optim.linearization.checks import Checked
from ngd_optim.linearization.product import ClosureProduct
from ngd_optim.parameters import FlatParameters
from ngd_optim.tracing import TracedClosure

RESULTS = Path(__file__).parent / "results"
OURS = "ngd_optim"


def softmax_metric(z: Tensor) -> Callable[[Tensor], Tensor]:
    """``u ↦ H_z u`` of the mean cross-entropy, in closed form."""
    p = z.softmax(-1)
    return lambda u: (p * u - p * (p * u).sum(-1, keepdim=True)) / len(z)


def products(
    model: nn.Module, x: Tensor, classes: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, Tensor]]:
    """Ways to form one product, and what those that form the same product gave."""
    y = torch.randint(0, classes, (len(x),))
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in params)
    sizes = [p.numel() for p in params]
    v = torch.randn(sum(sizes))
    pieces = tuple(piece.view_as(p) for piece, p in zip(v.split(sizes), params, strict=True))

    def flat(tensors: Any) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def output(*tensors: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, tensors, strict=True)), (x,))

    point = ngd_optim.linearize(lambda: F.cross_entropy(model(x), y), params)
    point.curvature(v)
    z, pull = vjp(output, *values)
    apply_hessian = softmax_metric(z.detach())
    _, push = linearize(output, *values)
    curvlinops = GGNLinearOperator(
        model, nn.CrossEntropyLoss(), params, [(x, y)], check_deterministic=False
    )

    logits = model(x)
    kl = F.kl_div(
        logits.log_softmax(-1),
        logits.detach().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    kl_gradient = flat(torch.autograd.grad(kl, params, create_graph=True))
    scalar = ScalarFunction(
        lambda t: F.cross_entropy(
            output(*(p.view_as(q) for p, q in zip(t.split(sizes), params, strict=True))), y
        ),
        (len(v),),
        hessp=True,
    )
    hessian_product = scalar.closure(flat(values)).hessp

    ways = {
        "gradient": lambda: torch.autograd.grad(F.cross_entropy(model(x), y), params),
        OURS: lambda: point.curvature(v),
        "double-backward KL": lambda: flat(
            torch.autograd.grad(kl_gradient @ v, params, retain_graph=True)
        ),
        "fresh jvp + vjp": lambda: flat(pull(apply_hessian(jvp(output, values, pieces)[1]))),
        "torch.func.linearize": lambda: flat(pull(apply_hessian(push(*pieces)))),
        "curvlinops": lambda: curvlinops @ v,
        "pytorch-minimize (Hessian)": lambda: hessian_product.mv(v),
    }
    same = {
        name: ways[name]()
        for name in ways
        if name not in ("gradient", "pytorch-minimize (Hessian)")
    }
    return ways, same


def recording(model: nn.Module, x: Tensor, classes: int, repeats: int) -> dict[str, Any]:
    """What a point costs before its products are cheap: the first, which is recorded, ÷ one by fresh forward mode."""
    y = torch.randint(0, classes, (len(x),))
    params = list(model.parameters())
    parameters = FlatParameters([{"params": params}])
    v = torch.randn(sum(p.numel() for p in params))

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    ways = linearize_ways(closure, params)
    seconds: dict[str, list[float]] = {"direct": [], "first": []}
    for _ in range(repeats):
        for name, way in (("direct", Way("torch.func", recorded=False)), ("first", ways[0])):
            run = TracedClosure(closure, parameters)
            graph = Graph(run, parameters, "ggn")
            graph.get()
            checked = Checked((way,))
            product = ClosureProduct(
                graph,
                parameters,
                checked,
                ALONE,
                print,
                lambda c=checked: c,
                captures=False,
                keep_graph=True,
            )
            start = process_time()
            product.form(v)
            seconds[name].append(process_time() - start)
    return ratios(seconds, "direct")["first"]


def linearize_ways(closure: Callable[[], Tensor], params: list[Tensor]) -> tuple[Way, ...]:
    """The ways to form products that the check of a closure finds right, in order of preference."""
    learnt: dict[Any, Checked] = {}
    parameters = FlatParameters([{"params": params}])
    runs = [TracedClosure(closure, parameters)]
    linearize_mean(parameters, "ggn", "auto", learnt, ALONE, runs)
    (checked,) = learnt.values()
    return checked.ways


def measure(repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All models: product ÷ gradient for each way that works on it, and recording ÷ direct product."""
    results, recorded = {}, {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, x, classes = make()
        # The peers cannot differentiate fused attention and LSTM kernels twice; ngd_optim sees to that by itself.
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled="LSTM" not in name):
            ways, same = products(model, x, classes)
            for way, product in same.items():
                error = ((product - same[OURS]).norm() / same[OURS].norm()).item()
                assert error < 1e-3, f"{way} on {name}: relative difference {error}"
            results[name] = {}
            for way in list(ways)[1:]:  # in pairs, so that no other way has just emptied the cache
                pair = {"gradient": ways["gradient"], way: ways[way]}
                results[name] |= ratios(interleaved(pair, repeats), "gradient")
            recorded[name] = recording(model, x, classes, repeats)
        print(name, {way: round(r["median"], 2) for way, r in results[name].items()})
    return results, recorded


def table(results: dict[str, Any], recorded: dict[str, Any]) -> str:
    """Markdown: a way per row, a model per column."""

    def cell(r: dict[str, float]) -> str:
        return f"{r['median']:.2f} ({r['low']:.2f}–{r['high']:.2f})"

    ways = list(next(iter(results.values())))
    lines = [
        "| product ÷ gradient | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for way in ways:
        cells = " | ".join(cell(r[way]) for r in results.values())
        lines.append(f"| {f'**{way}**' if way == OURS else way} | {cells} |")
    cells = " | ".join(cell(r) for r in recorded.values())
    lines.append(f"| first product, recorded ÷ one by fresh forward mode | {cells} |")
    lines += [
        "",
        "One CPU thread; glibc's allocator keeps large blocks: `MALLOC_TRIM_THRESHOLD_` and "
        "`MALLOC_MMAP_THRESHOLD_` are 2³⁰.",
    ]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any]) -> Figure:
    """Bars, a group per model."""
    colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#999999"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ways = list(next(iter(results.values())))
    width = 0.8 / len(ways)
    for i, (way, colour) in enumerate(zip(ways, colours, strict=False)):
        middle = [r[way]["median"] for r in results.values()]
        spread = [
            [r[way]["median"] - r[way]["low"] for r in results.values()],
            [r[way]["high"] - r[way]["median"] for r in results.values()],
        ]
        places = [group + (i - len(ways) / 2 + 0.5) * width for group in range(len(results))]
        axes.bar(places, middle, width, yerr=spread, label=way, color=colour, error_kw={"lw": 0.8})
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.set_xticks(range(len(results)), [name.replace(", ", "\n", 1) for name in results])
    axes.set_ylabel("time of one product ÷ one gradient")
    axes.legend(ncols=3, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=31, help="interleaved rounds (default: %(default)s)"
    )
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    results, recorded = measure(arguments.repeats)
    RESULTS.mkdir(exist_ok=True)
    everything = {"machine": machine(), "ratios": results, "recording": recorded}
    (RESULTS / "products.json").write_text(json.dumps(everything, indent=1) + "\n")
    (RESULTS / "products.md").write_text(table(results, recorded))
    draw(results).savefig(RESULTS / "products.png", dpi=150)
    print(table(results, recorded))


if __name__ == "__main__":
    main()
