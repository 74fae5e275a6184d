"""A linear function of a vector, recorded as a program of aten operations and replayed."""

from ngd_optim.recording.memory import Memory, Recall
from ngd_optim.recording.recorder import CannotReplayError, Recording

__all__ = ["CannotReplayError", "Memory", "Recall", "Recording"]
