"""This process among the others: its rank, its device, its threads."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch

from flexlora_ds.devices import count_gpus, gpu_of_process
from flexlora_ds.extensions import prepare_extensions, without_shared_buffers
from flexlora_ds.launcher import require_environment, require_rendezvous
from launch.distributed.port import port_faults
from launch.distributed.threads import limit_threads

_PREPARING_SECONDS = 86_400.0  # one process may tokenise or compile for hours while the others wait
_SIGNS_FIRST_SECONDS = 30.0


@dataclass(frozen=True)
class Process:
    """One process of a run."""

    rank: int
    world_size: int
    device: torch.device
    threads: int

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is process 0, which prints and writes."""
        return self.rank == 0


def world_size_of_environment() -> int:
    """The number of processes as the launcher says, before communication begins.

    Raises:
        UserError: as `require_environment`.
    """
    return require_environment()


def join_processes(timeout: float | None = None) -> Process:
    """Begin communication, under a launcher or alone, with or without a GPU.

    Args:
        timeout: seconds that the processes wait for each other to begin, where DeepSpeed's own (ten minutes, or the
            DEEPSPEED_TIMEOUT in the environment) are fewer. With it collectives are first without a limit; see
            `limit_collectives`.

    Raises:
        UserError, RunError: as `prepare_extensions` (a CPU run without a C++ compiler), and where the environment
            leads to no other process, the port is in use, or GPUs are too few or out of torch's reach.
    """
    require_rendezvous()
    gpus = choose_accelerator()
    threads = limit_threads()
    prepare_extensions()
    import deepspeed
    from deepspeed import comm
    from deepspeed.constants import default_pg_timeout

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    device = torch.device("cpu")
    if gpus:
        device = torch.device("cuda", gpu_of_process(gpus))
        torch.cuda.set_device(device)
        # DeepSpeed takes the GPU of this number, where a process sees its own alone, too.
        os.environ["LOCAL_RANK"] = str(device.index)
    with port_faults(), without_shared_buffers():
        longest = max(default_pg_timeout, timedelta(seconds=timeout or 0))
        deepspeed.init_distributed("nccl" if gpus else "gloo", verbose=False, timeout=longest)
    if timeout is not None:
        limit_collectives(None)
    return Process(comm.get_rank(), comm.get_world_size(), device, threads)


def limit_collectives(timeout: float | None) -> None:
    """How long a collective of this process may take from now on, in seconds; None: as long as one may prepare.

    Signs of life find out who is gone within `timeout`; the collectives get some seconds more, so that they only end
    where every process lives and one hangs.
    """
    seconds = _PREPARING_SECONDS if timeout is None else timeout + _SIGNS_FIRST_SECONDS
    # torch has no public way; DeepSpeed makes groups of its own, which would keep torch's default.
    known = torch.distributed.distributed_c10d
    for group in known._world.pg_map:
        known._set_pg_timeout(timedelta(seconds=seconds), group)


def choose_accelerator() -> int:
    """The number of GPUs here; where there is none, DeepSpeed gets to know before it is imported.

    Raises:
        UserError: as `count_gpus`.
    """
    gpus = count_gpus()
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return gpus


def end_process(code: int) -> NoReturn:
    """End with an exit code; communication, where it has begun, ends first.

    The interpreter is not torn down then. Threads of Gloo and of the store go on when communication has ended. One that
    lets go of Python's objects meanwhile would end a finished process by SIGABRT ('terminate called without an active
    exception', torch 2.11 and 2.13). After a failure only Gloo's communication ends: NCCL would wait for processes
    that are gone.
    """
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()):
        sys.exit(code)
    if code == 0 or group.get_backend() == "gloo":
        group.destroy_process_group()
    atexit._run_exitfuncs()  # what Python would call itself
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
