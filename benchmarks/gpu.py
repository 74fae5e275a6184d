"""What the library does on a GPU, in at most eight minutes, most important first.

    python benchmarks/gpu.py              # on the first GPU; writes results/gpu-<card>.json and .md
    python benchmarks/gpu.py --device cpu --seconds 60   # try the script itself

It needs torch, numpy and pytest alone. Each part is written down as soon as it is done. One that fails is reported and
passed over, and so is one for which no time is left. The text stream comes from Python's own reference; a part that
needs data from a package which is not there says so.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import MODELS, mlp
from torch import Tensor, nn

from ngd_optim import NaturalCG, conjugate_gradient, least_squares, linearize

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """The median time of a call, the device waited for, after two calls that are not counted."""
    times = []
    for i in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times += [1e3 * (time.perf_counter() - start)] * (i >= 2)
    return median(times)


def peak_memory(function: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a call takes beside what is there already, at most; NaN where the device does not tell."""
    if device.type != "cuda":
        return math.nan
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def count_launches(function: Callable[[], Any], device: torch.device) -> int:
    """Kernels that a call starts."""
    kind = (
        torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    )
    activity = getattr(torch.profiler.ProfilerActivity, device.type.upper())
    with torch.profiler.profile(activities=[activity]) as profile:
        function()
        synchronize(device)
    return sum(event.count for event in profile.key_averages() if event.device_type == kind)


class Transformer(nn.Module):
    """Two encoder layers, mean-pooled, as wide as asked for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, batch_first=True, dropout=0.0
        )
        self.embedding = nn.Embedding(1_000, width)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)).mean(1))


def strided_cnn() -> nn.Module:
    """Four convolutions on 224×224 images."""
    layers: list[nn.Module] = []
    for before, after in ((3, 64), (64, 128), (128, 256), (256, 256)):
        layers += [nn.Conv2d(before, after, 3, padding=1, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


WIDER: dict[str, Callable[[], tuple[nn.Module, Tensor, int]]] = {
    "MLP 4096³, batch 1024": lambda: (mlp(4096, 4096, 4096, 10), torch.randn(1024, 4096), 10),
    "transformer, width 1024, 32×128": lambda: (
        Transformer(1024),
        torch.randint(0, 1_000, (32, 128)),
        10,
    ),
    "CNN, 224×224, batch 64": lambda: (strided_cnn(), torch.randn(64, 3, 224, 224), 10),
}


def prepare(name: str, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model on the device, and the closure of its loss."""
    torch.manual_seed(0)
    model, x, classes = {**MODELS, **WIDER}[name]()
    y = torch.randint(0, classes, (len(x),))
    model, x, y = model.to(device), x.to(device), y.to(device)
    return model, lambda: F.cross_entropy(model(x), y)


def run_tests(device: torch.device, seconds: float) -> Result:
    """The core's tests, those that can run there."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    rooms = ["linalg", "recording", "curvature", "solvers", "step", "linearization", "jacobian"]
    paths = [str(ROOT / "tests" / room) for room in rooms]
    try:
        run = subprocess.run(
            [*command, "--device", device.type, *paths],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            cwd=ROOT,
        )
        lines = run.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        lines = [*(error.stdout or b"").decode().splitlines(), f"cut off after {seconds:.0f} s"]
    return {"summary": lines[-1:], "failed": [line for line in lines if line.startswith("FAILED")]}


def solve_without_waiting(device: torch.device, seconds: float) -> Result:
    """A solve under ``set_sync_debug_mode``: which lines of ours make the host wait, and how often."""
    n = 200
    torch.manual_seed(0)
    root = torch.randn(n, n, device=device, dtype=torch.float64)
    matrix = root @ root.T / n + torch.eye(n, device=device, dtype=torch.float64)
    b = torch.ones(n, device=device, dtype=torch.float64)
    mode = partial(torch.cuda.set_sync_debug_mode) if device.type == "cuda" else lambda mode: None
    with recorded_warnings() as waits:
        mode("warn")
        try:
            solution = conjugate_gradient(matrix.mv, b, tol=1e-8)
        finally:
            mode("default")
    return {
        "iterations": solution.iterations,
        "waits": len(waits),
        "most expected": math.ceil(solution.iterations / 8) + 7,
        "residual": solution.residual,
    }


@contextmanager
def recorded_warnings() -> Iterator[list[Any]]:
    """The warnings of a block, each time that they come."""
    import warnings

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


PRECISIONS: dict[str, Callable[[torch.device], Any]] = {
    "float32": lambda device: nullcontext(),
    "TF32": lambda device: tf32(),
    "bf16 autocast": lambda device: torch.autocast(device.type, dtype=torch.bfloat16),
}


@contextmanager
def tf32() -> Iterator[None]:
    """Matrix products of float32 with fewer digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compare_products(device: torch.device, seconds: float) -> Result:
    """Milliseconds of a gradient, and of products that are recorded and formed directly."""
    found: Result = {}
    deadline = time.monotonic() + seconds
    for name in (*MODELS, *WIDER):
        for precision, context in PRECISIONS.items():
            if time.monotonic() > deadline:
                return found
            with context(device):
                found[f"{name}, {precision}"] = time_products(name, device)
    return found


def time_products(name: str, device: torch.device) -> Result:
    """One model's."""
    try:
        model, closure = prepare(name, device)
        params = list(model.parameters())
        point = linearize(closure, params)
        v = torch.randn_like(point.gradient)
        gradient = milliseconds(lambda: torch.autograd.grad(closure(), params), device)
        product = milliseconds(lambda: point.curvature(v), device)
        result = {"gradient": gradient, "product": product, "ratio": product / gradient}
        return result | {"launches": count_launches(lambda: point.curvature(v), device)}
    except Exception as error:  # the next model may do
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def measure_steps(device: torch.device, seconds: float) -> Result:
    """A step's milliseconds, launches and peak memory beside a gradient's."""
    found: Result = {}
    deadline = time.monotonic() + seconds
    for name in (*MODELS, *WIDER):
        if time.monotonic() > deadline:
            break
        model, closure = prepare(name, device)
        params = list(model.parameters())
        settings = {"max_cg_iters": 10, "cg_progress_tol": 0.0}
        optimizer = NaturalCG(params, **settings)
        by_graphs = NaturalCG(params, cuda_graphs=True, **settings)
        for _ in range(4):  # the first one checks the closure, the last one renews its products
            optimizer.step(closure)
            by_graphs.step(closure)
        gradient = partial(lambda c, p: torch.autograd.grad(c(), p), closure, params)
        found[name] = {
            "gradient": milliseconds(gradient, device, 5),
            "step of ten products": milliseconds(
                lambda o=optimizer, c=closure: o.step(c), device, 5
            ),
            "the same by CUDA graphs": milliseconds(
                lambda o=by_graphs, c=closure: o.step(c), device, 5
            ),
            "launches of a step": count_launches(lambda o=optimizer, c=closure: o.step(c), device),
            "memory of a step": peak_memory(lambda o=optimizer, c=closure: o.step(c), device),
            "memory of a gradient": peak_memory(gradient, device),
        }
    return found


def race(device: torch.device, seconds: float) -> Result:
    """Losses after the same wall-clock time, beside Adam and L-BFGS."""
    contests = {"text": text_stream, "Poisson 2-D, 257 parameters": partial(poisson, width=64)}
    with_data = {"autoencoder, tanh": autoencoder}
    share = seconds / (3 * len({**contests, **with_data}))
    return {
        name: {
            method: run_for(share, *make(device), method, device)
            for method in ("NaturalCG", "Adam", "L-BFGS")
        }
        for name, make in {**contests, **with_data}.items()
    }


def run_for(
    seconds: float,
    model: nn.Module,
    losses: Iterator[Callable[[], Tensor]],
    method: str,
    device: torch.device,
) -> Result:
    """The last loss and how many steps were taken."""
    optimizer: Any = {
        "NaturalCG": lambda p: NaturalCG(p),
        "Adam": lambda p: torch.optim.Adam(p, lr=3e-3),
        "L-BFGS": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
    }[method](model.parameters())
    start, steps, loss = time.monotonic(), 0, torch.tensor(math.nan)
    while time.monotonic() - start < seconds:
        inner = next(losses)

        def closure(inner: Callable[[], Tensor] = inner) -> Tensor:
            optimizer.zero_grad()
            loss = inner()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        steps += 1
        synchronize(device)
    return {"loss": loss.item(), "steps": steps}


def text_stream(device: torch.device) -> tuple[nn.Module, Iterator[Callable[[], Tensor]]]:
    """A small transformer on fresh pieces of text."""
    from tasks import CHARACTERS, CONTEXT, LanguageModel

    torch.manual_seed(0)
    model, characters = LanguageModel().to(device), CHARACTERS.to(device)
    generator = torch.Generator().manual_seed(0)

    def losses() -> Iterator[Callable[[], Tensor]]:
        while True:
            starts = torch.randint(len(characters) - CONTEXT - 1, (128,), generator=generator)
            places = starts.unsqueeze(1) + torch.arange(CONTEXT + 1)
            pieces = characters[places.to(device)]
            yield lambda p=pieces: F.cross_entropy(
                model(p[:, :-1]).flatten(0, 1), p[:, 1:].flatten()
            )

    return model, losses()


def autoencoder(device: torch.device) -> tuple[nn.Module, Iterator[Callable[[], Tensor]]]:
    """The digits' autoencoder, full batch."""
    from tasks import IMAGES, TASKS

    torch.manual_seed(0)
    model, images = TASKS["autoencoder, tanh"].make().to(device), IMAGES.to(device)

    def loss() -> Tensor:
        found = F.binary_cross_entropy_with_logits(model(images), images, reduction="sum")
        return found / len(images)

    return model, repeat(loss)


def poisson(device: torch.device, width: int) -> tuple[nn.Module, Iterator[Callable[[], Tensor]]]:
    """−Δu = f on the unit square by a network, in float64."""
    torch.manual_seed(0)
    model = mlp(2, width, 1).double().to(device)
    x = torch.rand(1_000, 2, dtype=torch.float64).to(device).requires_grad_()
    edge = torch.rand(200, 2, dtype=torch.float64)
    edge[torch.arange(200), torch.randint(0, 2, (200,))] = torch.randint(0, 2, (200,)).double()
    edge = edge.to(device)
    source = 2 * math.pi**2 * (math.pi * x.detach()).sin().prod(1)

    def loss() -> Tensor:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        bends = [
            torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in (0, 1)
        ]
        return least_squares(sum(bends) + source, 10 * model(edge)[:, 0])

    return model, repeat(loss)


def run_ddp(device: torch.device, seconds: float) -> Result:
    """A step of a DistributedDataParallel model in a group of one."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = mlp(20, 32, 5).to(device)
        parallel = nn.parallel.DistributedDataParallel(model)
        x, y = torch.randn(64, 20).to(device), torch.randint(0, 5, (64,)).to(device)
        optimizer = NaturalCG(parallel.parameters())
        losses = [optimizer.step(lambda: F.cross_entropy(parallel(x), y)).item() for _ in range(3)]
        return {"losses": losses}
    finally:
        dist.destroy_process_group()


PARTS: dict[str, tuple[Callable[[torch.device, float], Result], float]] = {
    "tests": (run_tests, 0.375),
    "waits": (solve_without_waiting, 0.02),
    "products": (compare_products, 0.2),
    "steps": (measure_steps, 0.15),
    "race": (race, 0.2),
    "ddp": (run_ddp, 0.05),
}
"""By name: what is done, and its share of the time."""


def main() -> None:
    """Run the parts, and write after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480.0, help="(default: %(default)s)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    found: Result = {"card": card, "torch": torch.__version__}
    path = arguments.results / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}"
    deadline = time.monotonic() + arguments.seconds
    for name in arguments.parts:
        function, share = PARTS[name]
        left = deadline - time.monotonic()
        if left < 0.5 * share * arguments.seconds:
            found[name] = {"error": "no time was left"}
        else:
            try:
                found[name] = function(device, min(left, share * arguments.seconds))
            except Exception as error:  # the other parts may do
                traceback.print_exc()
                found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(name, json.dumps(found[name], indent=1), flush=True)
        path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(found))


def table(found: Result) -> str:
    """Markdown: a section for each part, a row for each thing measured."""
    lines = [f"# {found['card']}, torch {found['torch']}", ""]
    for part, result in found.items():
        if not isinstance(result, dict):
            continue
        lines += [f"## {part}", ""]
        rows = {k: v for k, v in result.items() if isinstance(v, dict)}
        lines += [f"- {k}: {show(v)}" for k, v in result.items() if k not in rows]
        if rows:
            columns = list(dict.fromkeys(key for row in rows.values() for key in row))
            lines += ["", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
            lines += [
                f"| {name} | " + " | ".join(show(row.get(c, "")) for c in columns) + " |"
                for name, row in rows.items()
            ]
        lines.append("")
    return "\n".join(lines)


def show(value: Any) -> str:
    """In a cell."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {show(v)}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
