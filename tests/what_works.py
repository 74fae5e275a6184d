"""The README's table of what works, from the tables that the tests check. Run it to write it."""

from pathlib import Path

from test_models import CASES

from ngd_optim.losses import LOSSES

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- what works -->\n", "<!-- end of what works -->\n"
REFUSED = [
    ("Reentrant checkpointing", "use `use_reentrant=False`"),
    ("`Embedding(sparse=True)`", "use `sparse=False`"),
    ("float16, GradScaler", "use bfloat16"),
    ("Complex parameters; parameters on several devices; `DataParallel`", "use real parts; one device; DDP"),
]


def table() -> str:
    by_backend = {
        backend: ", ".join(case.label for case in CASES.values() if case.backend == backend)
        for backend in ("torch.func", "double-backward")
    }
    losses = ", ".join(sorted(f"`{function.__name__}`" for function in LOSSES))
    lines = [
        "| | how |",
        "|---|---|",
        f"| {by_backend['torch.func']} | forward mode |",
        f"| {by_backend['double-backward']} | double-backward, chosen by itself |",
        f"| Losses of closure form (a): {losses} | Gauss-Newton |",
        *(f"| {what} | refused: {instead} |" for what, instead in REFUSED),
    ]
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[-1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
