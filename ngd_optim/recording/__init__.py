"""A linear function of a vector, recorded as a program of aten operations and replayed."""

from ngd_optim.recording.memory import Memory, Recall
from ngd_optim.recording.program import Operation, Sharing, note_last_uses, without_dead_code
from ngd_optim.recording.recorder import CannotReplayError, Recorder, Recording

__all__ = [
    "CannotReplayError",
    "Memory",
    "Operation",
    "Recall",
    "Recorder",
    "Recording",
    "Sharing",
    "note_last_uses",
    "without_dead_code",
]
