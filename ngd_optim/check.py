"""Check a closure from the command line: ``python -m ngd_optim.check module:function``."""

import argparse
import importlib
import importlib.util
import inspect
import sys
from typing import Any

from ngd_optim.shown import show
from ngd_optim.testing import check_closure

_EXPLANATION = """\
The function, without arguments, returns what an optimizer would be given: (closure, params), where params are
parameters, pairs of a name and a parameter, or a module. The report tells what is recognised in the closure, and
whether its loss, gradient and curvature agree; the exit status is 1 if something is wrong.
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 0 if nothing is wrong, 1 if something is, 2 if there is nothing to check."""
    parser = argparse.ArgumentParser(
        prog="python -m ngd_optim.check", description=__doc__, epilog=_EXPLANATION
    )
    parser.add_argument("target", metavar="module:function", help="such as train:make_closure")
    parser.add_argument("--curvature", default="auto", help="auto, fisher, ggn or hessian")
    parser.add_argument(
        "--backend", default="auto", help="auto, double-backward, torch.func or differences"
    )
    given = parser.parse_args(arguments)
    try:
        closure, params = _load(given.target)
    except _NothingToCheckError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    report = check_closure(closure, params, curvature=given.curvature, backend=given.backend)
    print(report)
    return 0 if report.ok else 1


class _NothingToCheckError(Exception):
    """The target is none; the message says what one looks like."""


def _load(target: str) -> tuple[Any, Any]:
    name, colon, attribute = target.partition(":")
    if not colon or not attribute or name.endswith(".py") or "/" in name:
        raise _NothingToCheckError(
            f"the target must be module:function, such as train:make_closure for that function of "
            f"train.py in this folder, got {target!r}"
        )
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise _NothingToCheckError(f"there is no module {name!r} here or on Python's path")
    function = getattr(importlib.import_module(name), attribute, None)
    if not callable(function):
        raise _NothingToCheckError(f"{name!r} has no function {attribute!r}")
    needed = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise _NothingToCheckError(
            f"{target} must be a function without arguments, and it needs {', '.join(needed)}"
        )
    found = function()
    if not (isinstance(found, tuple) and len(found) == 2 and callable(found[0])):
        raise _NothingToCheckError(f"{target} must return (closure, params), got {show(found)}")
    closure, params = found
    named = getattr(params, "named_parameters", None)
    return closure, params if named is None else named()


if __name__ == "__main__":
    sys.exit(main())
