"""Processes of this machine: which started this one, and which have ended."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import psutil

_LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "torch.distributed.run", "torch.distributed.launch"}
_LAUNCHERS |= {"deepspeed.launcher.runner", "deepspeed.launcher.launch"}
_SAME_START_SECONDS = 2.0  # two processes may take the machine's own start for a second apart


def find_process(pid: int, started: float) -> psutil.Process | None:
    """The process of this number, if it began at `started` (seconds since 1970); None for another or none.

    A container has numbers of its own: the same one may be another process there.
    """
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(pid)
        if abs(found.create_time() - started) < _SAME_START_SECONDS:
            return found
    return None


def has_ended(process: psutil.Process) -> bool:
    """Whether it has ended, reaped by its parent or not; its number used again is not taken for it."""
    try:
        return not process.is_running() or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def launchers_above() -> list[psutil.Process]:
    """This process's parent, and above it whatever starts others in turn.

    `deepspeed` is two processes, of which only the lower one is our parent: the upper one may be killed alone.
    """
    above = psutil.Process().parents()
    return [*above[:1], *itertools.takewhile(_is_launcher, above[1:])]


def _is_launcher(process: psutil.Process) -> bool:
    """By its first words: `python -u -m deepspeed.launcher.launch …`, `/usr/bin/python /venv/bin/torchrun …`."""
    with contextlib.suppress(psutil.Error):
        return process.pid > 1 and any(Path(word).name in _LAUNCHERS for word in process.cmdline()[:4])
    return False
