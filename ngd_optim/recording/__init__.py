"""Programs of aten operations: a linear function of a vector, and what a closure computes from parameters."""

from ngd_optim.recording.forward import WRITES_PARAMETERS, ForwardProgram, ForwardRecorder
from ngd_optim.recording.program import CannotReplayError
from ngd_optim.recording.recorder import Recording, record

__all__ = [
    "WRITES_PARAMETERS",
    "CannotReplayError",
    "ForwardProgram",
    "ForwardRecorder",
    "Recording",
    "record",
]
