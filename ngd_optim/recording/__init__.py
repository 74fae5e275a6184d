"""Programs of aten operations: a linear function of a vector, and what a closure computes from parameters."""

from ngd_optim.recording.forward import ForwardRecorder
from ngd_optim.recording.forward_program import ForwardProgram
from ngd_optim.recording.kept import KeptRecordings
from ngd_optim.recording.recorder import record

__all__ = [
    "ForwardProgram",
    "ForwardRecorder",
    "KeptRecordings",
    "record",
]
