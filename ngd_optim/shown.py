"""How values are shown: in a message in a few words, however large they are, and in notebooks as a table."""

import reprlib
from collections.abc import Mapping
from html import escape
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


def html_table(title: str, rows: Mapping[str, Any]) -> str:
    """Names and values, as notebooks show them."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th>"
        f"<td style='text-align:left'>{escape(_in_short(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"


def _in_short(value: Any) -> str:
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else show(value)
        if not isinstance(value, str)
        else value
    )
