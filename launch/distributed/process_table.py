"""Processes of this machine as the kernel knows them, so that a number used again is not taken for the old process."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "torch.distributed.run", "torch.distributed.launch"}
_LAUNCHERS |= {"deepspeed.launcher.runner", "deepspeed.launcher.launch"}


@dataclass(frozen=True)
class Entry:
    """One process: its number, and when it started in the kernel's ticks; empty where the kernel does not say."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Entry:
        """The process that has this number now."""
        return cls(pid, _status(pid)[1])

    @property
    def known(self) -> bool:
        """Whether the kernel says enough to tell when it has ended (Linux does)."""
        return self.started != ""

    def gone(self) -> bool:
        """Whether it has ended, reaped by its parent or not."""
        return self.known and _status(self.pid)[1] != self.started


def launchers_above() -> list[Entry]:
    """This process's parent, and above it whatever starts others in turn.

    `deepspeed` is two processes, of which only the lower one is our parent: the upper one may be killed alone.
    """
    found = [Entry.of(os.getppid())]
    while (above := _status(found[-1].pid)[0]) > 1 and _is_launcher(above):
        found.append(Entry.of(above))
    return found


def _is_launcher(pid: int) -> bool:
    """By its first words: `python -u -m deepspeed.launcher.launch …`, `/usr/bin/python /venv/bin/torchrun …`."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:4]
        return any(Path(word).name in _LAUNCHERS for word in words)
    return False


def _status(pid: int) -> tuple[int, str]:
    """(parent, start) of a process; (0, "") for one that has ended, also if not yet reaped."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()  # its name, in parentheses, may hold anything
        if fields[0] not in "ZX":
            return int(fields[1]), fields[19]
    return 0, ""
