"""How many threads this process computes with: its share of the machine's cores, or what the user wants."""

from __future__ import annotations

import contextlib
import os

import psutil
import torch


def limit_threads(local_processes: int | None = None) -> int:
    """Share this machine's cores among its processes; the number of threads torch now uses in this one.

    `local_processes` defaults to what the launcher says (torchrun: LOCAL_WORLD_SIZE, DeepSpeed: LOCAL_SIZE). A lower
    OMP_NUM_THREADS of the user's is kept: the launcher does not know what else shares the machine.
    """
    variables = os.environ
    if local_processes is None:
        local_processes = int(variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE") or 1)
    threads = max(1, _cores() // local_processes)
    wanted = variables.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and not _is_torchruns_default(wanted, local_processes):
        threads = max(1, min(threads, int(wanted)))
    variables["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    return threads


def _is_torchruns_default(wanted: str, local_processes: int) -> bool:
    """Whether torchrun has set OMP_NUM_THREADS, and not the user.

    It sets 1 where nothing is set and it starts several processes (torch/distributed/run.py). The environment that it
    was itself started with shows which it was.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or wanted != "1" or local_processes == 1:
        return False
    with contextlib.suppress(psutil.Error, OSError):
        return "OMP_NUM_THREADS" not in psutil.Process(os.getppid()).environ()
    return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
