"""Ratios that can be trusted: interleaved repeats in one process on one thread, medians and quartiles."""

import os
import platform
import sys
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from time import process_time
from typing import Any

import torch


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each function, called in turn, after one call each that is not counted.

    The CPU time of one thread is what other processes on the machine disturb least.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = process_time()
            function()
            seconds[name].append(process_time() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Each function's time ÷ the base's, round by round: median and quartiles."""
    result = {}
    for name, own in seconds.items():
        if name == base:
            continue
        by_round = [a / b for a, b in zip(own, seconds[base], strict=True)]
        low, _, high = quantiles(by_round, n=4)
        result[name] = {"median": median(by_round), "low": low, "high": high}
    return result


_THRESHOLDS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_memory() -> None:
    """Start the script again where glibc keeps the memory that is given back to it.

    Else it returns large blocks to the system, and takes them again page by page at each call: as
    long as that takes, all ways look alike. glibc reads the thresholds when a process starts.
    """
    wanted = dict.fromkeys(_THRESHOLDS, str(2**30))
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    return {
        **{name: os.environ[name] for name in _THRESHOLDS if name in os.environ},
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "processor": platform.machine(),
    }
