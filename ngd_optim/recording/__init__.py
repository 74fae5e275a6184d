"""A linear function of a vector, recorded as a program of aten operations and replayed."""

from ngd_optim.recording.recorder import CannotReplayError, Recording, record

__all__ = ["CannotReplayError", "Recording", "record"]
