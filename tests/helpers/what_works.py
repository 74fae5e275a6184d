"""The tables of what works in the documentation, from the tables that the tests check.

Run it to write them.
"""

from pathlib import Path

from helpers import models
from helpers.models import CASES
from ngd_optim.recognised import LOSSES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "what_works.md"
REFUSED = [
    ("Reentrant checkpointing", "use `use_reentrant=False`"),
    ("`Embedding(sparse=True)`", "use `sparse=False`"),
    ("float16, GradScaler", "use bfloat16"),
    (
        "Parameters on several devices; `DataParallel`",
        "use one device; DDP",
    ),
]
BACKENDS = {"torch.func": "double-backward, torch.func", "double-backward": "double-backward"}
"""Of a case, the backends that are right: double-backward always is."""


def summary() -> str:
    """What works how."""
    by_backend = {
        backend: ", ".join(case.label for case in CASES.values() if case.backend == backend)
        for backend in ("torch.func", "double-backward")
    }
    names = {function.__name__ for function in LOSSES} | {"linear_cross_entropy"}  # of torch 2.13
    losses = ", ".join(sorted(f"`{name}`" for name in names))
    lines = [
        "| | how |",
        "|---|---|",
        f"| {by_backend['torch.func']} | both backends; double-backward is taken, for convolutions forward mode |",
        f"| {by_backend['double-backward']} | double-backward alone, chosen by itself |",
        f"| Losses of closure form (a): {losses} | Gauss-Newton |",
        *(f"| {what} | refused: {instead} |" for what, instead in REFUSED),
    ]
    return "\n".join(lines) + "\n"


def models_and_losses() -> str:
    """The documentation's table: model × loss, as `test_gradient_and_product_are_the_dense_ones` goes through them."""
    losses = list(models.LOSSES)
    lines = [
        "| model | " + " | ".join(f"`{loss}`" for loss in losses) + " | products by |",
        "|---|" + "---|" * (len(losses) + 1),
        *(
            f"| {case.label} | " + "✓ | " * len(losses) + f"{BACKENDS[case.backend]} |"
            for case in CASES.values()
        ),
    ]
    return "\n".join(lines) + "\n"


TABLES = {"what works": summary, "models and losses": models_and_losses}


def with_tables(text: str) -> str:
    """The page's text, with its tables as the tests have them now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + table() + end + rest.split(end)[-1]
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
