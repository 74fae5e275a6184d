"""The steps that were taken: remembered, logged, and shown in notebooks."""

import logging
from collections import deque
from typing import Any

from ngd_optim.saved import SavedInFull
from ngd_optim.shown import html_table

logger = logging.getLogger("ngd_optim")

_LONGEST = 4096
"""So many reports are kept, the last ones."""


class Followed(SavedInFull):
    """An optimizer whose run can be followed without code: by ``history``, the logger, and in notebooks.

    Each step is a line of the logger ``ngd_optim`` at level INFO.
    """

    history: "deque[Any]"
    """The reports of the last 4,096 steps, oldest first; no part of ``state_dict``."""

    def begin_history(self) -> None:
        """Have an empty history, unless there is one."""
        # In the instance: wrappers of Lightning and Fabric are subclasses with the same ``__dict__``.
        self.__dict__.setdefault("history", deque(maxlen=_LONGEST))

    def remember(self) -> None:
        """Note and log the report of the step that has just come to its end, if it has one."""
        report = self.last_step
        if report is not None and not (self.history and self.history[-1] is report):
            self.history.append(report)
            logger.info("%s", report)

    def _repr_html_(self) -> str:
        """Notebooks show this: the settings, and the last step."""
        settings = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        count = sum(p.numel() for p in self._everything)
        groups = len(self.param_groups)
        title = f"{type(self).__name__}: {count:,} parameters" + (
            f" in {groups} groups; the first one's settings" if groups > 1 else ""
        )
        last = "" if self.last_step is None else self.last_step._repr_html_()
        return html_table(title, settings) + last
