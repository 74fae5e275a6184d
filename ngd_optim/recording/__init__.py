"""Programs of aten operations: a linear function of a vector, and what a closure computes from parameters."""

from ngd_optim.recording.forward import ForwardProgram, ForwardRecorder
from ngd_optim.recording.program import CannotReplayError
from ngd_optim.recording.recorder import Recording, record

__all__ = ["CannotReplayError", "ForwardProgram", "ForwardRecorder", "Recording", "record"]
