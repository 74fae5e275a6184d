"""What was aimed at, what was measured, and why the rest was missed, from the results of the other benchmarks.

    python benchmarks/goals.py

Writes results/README.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from growth import slopes

RESULTS = Path(__file__).parent / "results"
DOUBLE_BACKWARD = "double-backward KL"
AT_MOST = {"policy MLP": 0.8, "MLP 784": 1.15, "CNN": 1.15, "transformer": 1.4}
WHY = {
    "policy MLP": "three quarters of a product are matrix products, as of a gradient",
    "CNN": "convolutions with a stride cost a product more than a gradient, now that page faults no longer hide it",
    "curvlinops": "large convolutions take as long in all ways",
    "small": "the smaller the operations, the more of the time is Python's, for all ways alike",
    "MLP 784": "at the floor: by its operations a product of this network takes 1.22 times the multiplications",
    "recording LSTM": "some 900 small operations, and double-backward has a graph to build first",
    "recording": "each operation is noted in Python, which takes as long as the operation",
    "few samples": "where parameters outnumber activations the step holds some nine vectors of their length, "
    "the gradient two; conjugate gradients alone need four, the line search one",
    "TRPO": "more than half of an update is trace, recording and line search; it needs six to fifteen products",
}


class Goal(NamedTuple):
    """One line of the page."""

    what: str
    goal: str
    measured: str
    met: bool
    why: str

    def line(self) -> str:
        """Markdown."""
        return f"| {self.what} | {self.goal} | {self.measured} | {'yes' if self.met else f'**no**: {self.why}'} |"


def product_goals(results: dict[str, Any]) -> Iterator[Goal]:
    """Time of a product."""
    ratios = results["ratios"]
    for start, limit in AT_MOST.items():
        name = next(name for name in ratios if name.startswith(start))
        found = ratios[name]["ngd_optim"]["median"]
        yield Goal(
            f"product ÷ gradient, {name}",
            f"≤ {limit}",
            f"{found:.2f}",
            found <= limit,
            WHY.get(start, ""),
        )
    for peer, times in (("curvlinops", 2.0), (DOUBLE_BACKWARD, 1.4)):
        found = {name: r[peer]["median"] / r["ngd_optim"]["median"] for name, r in ratios.items()}
        least = min(found, key=lambda name: found[name])
        measured = (
            f"{found[least]:.2f} ({least.split()[0].strip(',')}) to {max(found.values()):.2f}"
        )
        why = WHY.get(peer, WHY["small"])
        yield Goal(
            f"times as fast a product as {peer}", f"≥ {times}", measured, found[least] >= times, why
        )
    for name, r in results["recording"].items():
        found = r["median"]
        why = WHY["recording LSTM" if "LSTM" in name else "recording"]
        yield Goal(
            f"first product ÷ one by fresh forward mode, {name}",
            "≤ 1.5",
            f"{found:.2f}",
            found <= 1.5,
            why,
        )


def growth_goals(results: dict[str, Any]) -> Iterator[Goal]:
    """Growth and memory of a step."""
    for sweep in ("parameters", "batch"):
        for points, where in ((results[sweep], ""), (results[sweep][-2:], ", last decade")):
            ours, gradient = (slopes(points, sweep, way) for way in ("step", "gradient"))
            for what, key in (("time", "median"), ("memory", "memory")):
                found, why = ours[key], f"a gradient's is {gradient[key]:.2f}"
                yield Goal(
                    f"slope of a step's {what} with {sweep}{where}",
                    "≤ 1.05",
                    f"{found:.2f}",
                    found <= 1.05,
                    why,
                )
    for sweep in ("batch", "parameters"):
        point = results[sweep][-1]
        found = point["bytes"]["step"] / point["bytes"]["gradient"]
        size = f"{point['parameters']:,} parameters, batch {point['batch']:,}"
        why = WHY["few samples"]
        yield Goal(
            f"peak memory of a step ÷ a gradient's, {size}", "≤ 2", f"{found:.2f}", found <= 2, why
        )


def update_goals(results: dict[str, Any]) -> Iterator[Goal]:
    """Time of a TRPO update."""
    for task, ms in results["updates"].items():
        found = ms["sb3-contrib"] / ms["ngd_rl"]
        what = f"times as fast a TRPO policy update as sb3-contrib, {task}"
        yield Goal(what, "≥ 3", f"{found:.2f}", found >= 3, WHY["TRPO"])


INTRODUCTION = """# What was aimed at, and what was measured

Every figure is a ratio within one process on one CPU thread: the median of interleaved repeats. Quartiles are in
[products.md](products.md) and [growth.md](growth.md); [rl.md](rl.md) and [training.md](training.md) have learning and
training curves. `make bench` repeats all that results/ does not have yet and writes this page.

| | goal | measured | met |
|---|---|---|---|
"""
NOTES = """
No GPU was at hand. On an accelerator the solver's scalars stay on the device and the host waits at every eighth
iteration; products may be replayed by CUDA graphs. Both were tested on the CPU alone, with a stand-in for the device.

Where an LSTM's product goes: of 28 steps of 64 samples with 64 units it is 1,275 operations of 42 kB, at 9 µs each,
beside one fused kernel for the gradient's forward pass. Forward mode takes 15 % less than double-backward, whose
derivatives of `stack` and `unbind` add up whole sequences; to record it takes so long that it pays after some thirty
steps.

Tried and left out: one convolution over `[x | δx]` with weights `[δW; W]` in place of two (0.78 to 1.33 times their
time on seven shapes, with strides and without, in either memory format); `channels_last` within a recorded program
alone, where views of what is recorded ask for the other format: let the model and its batch have it, which products
follow; sums right after what they sum up (no difference); keeping recordings of more than 400 small operations by
double-backward, which is what steps on many tiny tensors are made of (9 gradients in place of 12, and 85 more in the
first three steps); recomputing the true residual during a solve, which in float32 delayed it (300 unknowns, condition
1e3, every 50 iterations: after 250 products an error of 1.1e-5 beside 4.5e-6, and it grew from there); one reduction
for the two scalar products of a preconditioned iteration, which needs a copy of a vector.
"""


def main() -> None:
    """Read the results and write the page."""
    pages = {"products": product_goals, "growth": growth_goals, "rl": update_goals}
    found = [
        goal
        for page, goals in pages.items()
        for goal in goals(json.loads((RESULTS / f"{page}.json").read_text()))
    ]
    (RESULTS / "README.md").write_text(
        INTRODUCTION + "\n".join(goal.line() for goal in found) + "\n" + NOTES
    )


if __name__ == "__main__":
    main()
