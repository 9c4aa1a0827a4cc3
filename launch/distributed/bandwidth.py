"""How fast the processes of a run exchange numbers, measured once at its start."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launch.distributed.agreement import largest
from launch.distributed.process import Process

MIB = 2**20
MESSAGE = 64 * MIB
_TRIAL = 4 * MIB
_LONGEST = 1.0
"""Seconds that the message may take; else the trial tells."""
_REPEATS = 3


@dataclass(frozen=True)
class Rate:
    """What one all-reduce took."""

    size: int
    """Bytes of the message."""
    seconds: float
    processes: int

    @property
    def bytes_per_s(self) -> float:
        """What each process sends, as nccl-tests counts it ('bus bandwidth'): 2 (n − 1)/n of the message by a ring."""
        return 2 * (self.processes - 1) / self.processes * self.size / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.size // MIB} MiB all-reduce over {self.processes} processes: {1e3 * self.seconds:.3g} ms, "
            f"{self.bytes_per_s / 1e9:.3g} GB/s"
        )


def measure_rate(process: Process, clock: Callable[[], float] = time.perf_counter) -> Rate | None:
    """The best of some all-reduces of 64 MiB, the same on all processes; None for one process. Collective.

    Where the message would take more than a second, a smaller one tells.
    """
    if process.world_size == 1:
        return None
    _seconds(process, _TRIAL, clock)  # the first connects
    trial = _seconds(process, _TRIAL, clock)
    if trial * MESSAGE / _TRIAL > _LONGEST:
        return Rate(_TRIAL, trial, process.world_size)
    repeats = _REPEATS if process.device.type == "cuda" else 1
    best = min(_seconds(process, MESSAGE, clock) for _ in range(repeats))
    return Rate(MESSAGE, best, process.world_size)


def _seconds(process: Process, size: int, clock: Callable[[], float]) -> float:
    """Of the slowest process."""
    message = torch.zeros(size // 4, device=process.device)
    dist.barrier()
    _finish(process)
    started = clock()
    dist.all_reduce(message)
    _finish(process)
    return max(1, *largest(process, [round(1e6 * (clock() - started))])) / 1e6


def _finish(process: Process) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
