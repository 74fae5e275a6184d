"""A linear function of a vector, recorded as a program of aten operations and replayed."""

from ngd_optim.recording.program import Operation, Sharing, note_last_uses, without_dead_code
from ngd_optim.recording.recorder import CannotReplayError, Recorder, Recording, record

__all__ = [
    "CannotReplayError",
    "Operation",
    "Recorder",
    "Recording",
    "Sharing",
    "note_last_uses",
    "record",
    "without_dead_code",
]
