"""Recorded products of a closure, kept from step to step."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngd_optim.recording.forward import ForwardRecorder
from ngd_optim.recording.recorder import Function, record_from
from ngd_optim.recording.renewal import Renewal
from ngd_optim.recording.trace import Trace
from ngd_optim.replaying import Plan, Recording

logger = logging.getLogger("ngd_optim")

_MOST_KEPT = 4
"""So many recordings are kept, and so many made in vain before no more are."""


class KeptRecordings:
    """Recorded products of a closure, from earlier steps, without what they read.

    A step whose closure does what it did before takes from its own run what the product reads, and
    records nothing. That was seen to be right once: where a product was recorded for the second time,
    what the first recording would have taken was bit for bit what the second one read.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._left = _MOST_KEPT
        self._steps = 0

    def form(
        self,
        recorder: ForwardRecorder,
        about: Any,
        make: Callable[[], Function],
        v: Tensor,
        *,
        captures: bool = False,
    ) -> tuple[Tensor, Recording]:
        """The product with ``v``, and the recording, renewed or made.

        Args:
            recorder: has seen the closure's run in this step.
            about: what tells, beside the operations of the run, which product it is: tensors, numbers
                and objects that hold them; None: that is not known.
            make: gives the product itself.
            v: a vector.
            captures: see :class:`Recording`.
        """
        self._steps += 1
        # Of what is seen once, nothing need be kept.
        follows = about is not None and self._left and self._steps > 1
        trace = recorder.trace(about) if follows else None
        kept = None
        if trace is not None:
            kept = next((k for k in self._kept if k.signature == trace.signature), None)
        if trace is not None and kept is not None and kept.is_right:
            renewed = kept.renew(trace, captures=captures)
            for other in self._kept:
                if other is not kept:
                    other.plan.let_go()
            if renewed is not None:
                return renewed(v), renewed
        # What makes the product is a part of what renews it.
        function = make() if trace is None else lambda u: make()(u)
        image, recording, renewal = record_from(trace, function, v.contiguous())
        recording = Recording(recording.plan, recording.constants, captures=captures)
        if trace is not None:
            self._learn(kept, trace, recording, renewal)
        # A replay rounds otherwise than what it was recorded from, and a run that is resumed records
        # where the one that went on does not.
        return image if about is None else recording(v), recording

    def _learn(
        self, kept: "_Kept | None", trace: Trace, recording: Recording, renewal: Renewal | None
    ) -> None:
        if kept is not None and not kept.is_right:
            kept.is_right = kept.agrees(trace, recording)
            if kept.is_right:
                self._left = _MOST_KEPT
                return
        if kept is not None:  # it was not right, or is so no longer
            self._kept.remove(kept)
        self._left -= 1
        if renewal is None or not self._left:
            self._left, self._kept = 0, []
            logger.debug("products are recorded anew at each step")
            return
        new = _Kept(trace.signature, recording.plan, renewal)
        self._kept = [*self._kept[1 - _MOST_KEPT :], new]


@dataclass
class _Kept:
    """One of them, and whether it was compared with another."""

    signature: Any
    plan: Plan
    renewal: Renewal
    is_right: bool = False

    def renew(self, trace: Trace, *, captures: bool = False) -> Recording | None:
        """The product of another run; None: it cannot be had."""
        constants = self.renewal(trace)
        return None if constants is None else Recording(self.plan, constants, captures=captures)

    def agrees(self, trace: Trace, recording: Recording) -> bool:
        """Whether renewing gives, bit for bit, what was recorded of the same run."""
        renewed = self.renew(trace)
        return (
            renewed is not None
            and self.plan.computes_like(recording.plan)
            and all(map(torch.equal, renewed.constants, recording.constants))
        )
