"""Cross-references of docstrings, which are in the form that Python's tools share, as links of the site."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr):`(?:([^`<]+) <)?(~?)([\w.]+)>?`")


class Roles(griffe.Extension):
    """Turns ``:class:`~package.Name``` into a link, and a name without its package into code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that is documented."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _link(role: re.Match[str]) -> str:
    text, tilde, path = role.groups()
    if not (text or tilde):
        return f"`{path}`"
    return f"[`{text or path.rpartition('.')[-1]}`][{path}]"
