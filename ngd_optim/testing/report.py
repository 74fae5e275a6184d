"""What a check has found, in a form to be read."""

from collections.abc import Iterator
from dataclasses import dataclass

_WIDTH = 15


@dataclass(frozen=True, kw_only=True)
class Report:
    """What all checks give.

    Attributes:
        problems: what is wrong, one sentence each, that says what to do.
        notes: what is worth knowing, and nothing wrong.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    subject = "it"

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def rows(self) -> Iterator[tuple[str, str]]:
        """What was measured, by name."""
        raise NotImplementedError

    def __str__(self) -> str:
        count = len(self.problems)
        verdict = "right" if self.ok else f"{count} problem{'s' * (count > 1)}"
        lines = [f"{self.subject}: {verdict}"]
        lines += [f"  {name:{_WIDTH}} {text}" for name, text in self.rows()]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def show_error(error: float | None) -> str:
    """A relative error in words."""
    return "not known" if error is None else f"{error:.1e} (relative)"
