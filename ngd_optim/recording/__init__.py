"""Programs of aten operations: a linear function of a vector, and what a closure computes from parameters."""

from ngd_optim.recording.forward import ForwardProgram, ForwardRecorder
from ngd_optim.recording.program import CannotReplayError
from ngd_optim.recording.recorder import KeptRecordings, record
from ngd_optim.recording.replay import Recording

__all__ = [
    "CannotReplayError",
    "ForwardProgram",
    "ForwardRecorder",
    "KeptRecordings",
    "Recording",
    "record",
]
