"""Several processes share one evaluation.

There is no process group. The launcher's key-value store hands out batches one by one, so no process waits for another.
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

from flexlora_ds.devices import count_gpus
from flexlora_ds.launcher import number_in_environment, require_environment, require_rendezvous

_START_TIMEOUT = timedelta(minutes=30)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WORK_TIMEOUT = timedelta(days=7)  # the launcher ends the others when one fails


class Team:
    """The processes of one evaluation, as seen by one of them; a single process keeps the counters itself.

    Raises:
        UserError: the environment names no process, or nothing says where the processes meet.
    """

    def __init__(self) -> None:
        require_rendezvous()
        self.size = require_environment()
        self.rank = number_in_environment("RANK", 0)
        self.local_rank = number_in_environment("LOCAL_RANK", 0)
        self.local_size = number_in_environment("LOCAL_WORLD_SIZE", self.size, least=1)
        self._store: Any = HashStore()
        self.started = self.size == 1

    def follow_launcher(self) -> None:
        """End with the launcher: a killed one must not leave processes that still write (Linux only)."""
        if self.size > 1 and sys.platform == "linux":
            launcher = os.getppid()
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:  # it died before the call
                sys.exit(1)

    def connect(self) -> None:
        """Connect to the launcher's key-value store."""
        if self.size > 1:
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(iter(rendezvous("env://", timeout=_START_TIMEOUT)))
            # A restarted group must not see the counters of the group before.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"eval/{attempt}", store)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process prints, merges prediction logs and writes results."""
        return self.rank == 0

    def set(self, key: str, value: str) -> None:
        """Publish a value under a key."""
        self._store.set(key, value)

    def get(self, key: str) -> str:
        """The value under a key; waits until a process has set it."""
        self._store.wait([key], _START_TIMEOUT)
        return bytes(self._store.get(key)).decode()

    def broadcast(self, key: str, value: str) -> str:
        """Rank 0's value, on every process."""
        if self.is_rank_zero:
            self.set(key, value)
        return self.get(key)

    def barrier(self, name: str) -> None:
        """Wait until every process has called this with the same name."""
        if self._store.add(f"at {name}", 1) == self.size:
            self._store.set(f"all at {name}", "1")
        self._store.wait([f"all at {name}"], _START_TIMEOUT)

    def claim_batches(self, end: int) -> Iterator[int]:
        """Batch numbers below `end`; each goes to one process only."""
        while (number := self._store.add("claimed", 1) - 1) < end:
            yield number

    def add_done(self, count: int) -> int:
        """Count finished items; how many all processes have finished."""
        return int(self._store.add("done", count))

    def finish(self) -> None:
        """Report that this process has no work left; rank 0 waits for all."""
        if self._store.add("finished", 1) == self.size:
            self._store.set("all finished", "1")
        if self.is_rank_zero:
            self._store.wait(["all finished"], _WORK_TIMEOUT)

    def device(self) -> torch.device:
        """This process's accelerator, or the CPU; several processes may share one. Raises UserError as `count_gpus`."""
        gpus = count_gpus()
        return torch.device("cuda", self.local_rank % gpus) if gpus else torch.device("cpu")

    def set_threads(self) -> int:
        """Share the machine's cores unless OMP_NUM_THREADS is set; the number of threads in use."""
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, _cores() // self.local_size))
        return torch.get_num_threads()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
