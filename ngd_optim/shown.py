"""How a value is shown in a message: in a few words, however large it is."""

import reprlib
from typing import Any

_LONGEST = 80


def show(value: Any) -> str:
    """Its type and shape if it has one and more than one element; else its ``repr``, cut to a line."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape not in ((), (1,)):
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    if isinstance(value, list | tuple | set | frozenset | dict) and len(repr(value)) > _LONGEST:
        return f"a {type(value).__name__} of {len(value)}"
    text = " ".join(reprlib.repr(value).split() if isinstance(value, str) else repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
