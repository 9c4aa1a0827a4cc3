"""Several processes on one evaluation: who they are, and how they share the work.

No process group: the launcher's key-value store hands out batches one by one, and nobody waits for others.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore, PrefixStore

_START_TIMEOUT = timedelta(minutes=30)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WORK_TIMEOUT = timedelta(days=7)  # the launcher ends the others when one is lost


class Team:
    """This process among `size`; alone, it keeps the counters itself."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        values = os.environ if environment is None else environment
        self.size = int(values.get("WORLD_SIZE", "1"))
        self.rank = int(values.get("RANK", "0"))
        self.local_rank = int(values.get("LOCAL_RANK", "0"))
        self.local_size = int(values.get("LOCAL_WORLD_SIZE", str(self.size)))
        self._store: Any = HashStore()
        self.started = self.size == 1

    def follow_launcher(self) -> None:
        """End with the launcher: a killed one must not leave processes that go on writing (Linux only)."""
        if self.size > 1 and sys.platform == "linux":
            launcher = os.getppid()
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:  # it died before the call
                sys.exit(1)

    def connect(self) -> None:
        """Meet the others at the launcher's address."""
        if self.size > 1:
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(iter(rendezvous("env://", timeout=_START_TIMEOUT)))
            # A restarted group must not see the counters of the group before.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"eval/{attempt}", store)

    @property
    def leads(self) -> bool:
        """Whether this process prints, folds and writes results."""
        return self.rank == 0

    def tell(self, key: str, value: str) -> None:
        """Leave a value for the others."""
        self._store.set(key, value)

    def hear(self, key: str) -> str:
        """Wait for a value that another process leaves."""
        self._store.wait([key], _START_TIMEOUT)
        return bytes(self._store.get(key)).decode()

    def agree(self, key: str, value: str) -> str:
        """The leading process's value, on every process."""
        if self.leads:
            self.tell(key, value)
        return self.hear(key)

    def meet(self, place: str) -> None:
        """Wait until every process has come here."""
        if self._store.add(f"at {place}", 1) == self.size:
            self._store.set(f"all at {place}", "1")
        self._store.wait([f"all at {place}"], _START_TIMEOUT)

    def shared_numbers(self, end: int) -> Iterator[int]:
        """Numbers below `end`; every number goes to one process of the team."""
        while (number := self._store.add("claimed", 1) - 1) < end:
            yield number

    def add_done(self, count: int) -> int:
        """Count finished items; how many the team has finished."""
        return int(self._store.add("done", count))

    def finish(self) -> None:
        """Say that this process has no work left; the leading one waits for all."""
        if self._store.add("finished", 1) == self.size:
            self._store.set("all finished", "1")
        if self.leads:
            self._store.wait(["all finished"], _WORK_TIMEOUT)

    def device(self) -> torch.device:
        """This process's accelerator, or the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")

    def set_threads(self) -> int:
        """Share the machine's cores unless OMP_NUM_THREADS is set; the number of threads in use."""
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, _cores() // self.local_size))
        return torch.get_num_threads()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
