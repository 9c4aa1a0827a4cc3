"""This process among the others: its rank, its device, its threads."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass

import torch

from launch.distributed.environment import port_faults, require_environment, require_rendezvous
from launch.distributed.extensions import prepare_extensions, without_shared_buffers
from launch.distributed.threads import limit_threads


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


def join_processes() -> Process:
    """Begin communication, under a launcher or alone, with or without a GPU.

    Raises:
        UserError, RunError: as `prepare_extensions` (a CPU run without a C++ compiler), and where the environment
            leads to no other process, or the port is in use.
    """
    require_rendezvous()
    gpus = choose_accelerator()
    threads = limit_threads()
    prepare_extensions()
    import deepspeed
    from deepspeed import comm

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    device = torch.device("cpu")
    if gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
        torch.cuda.set_device(device)
    with port_faults(), without_shared_buffers():
        deepspeed.init_distributed("nccl" if gpus else "gloo", verbose=False)
    return Process(comm.get_rank(), comm.get_world_size(), device, threads)


def choose_accelerator() -> int:
    """The number of GPUs here; where there is none, DeepSpeed gets to know before it is imported."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return gpus


def leave_processes(*, done: bool) -> None:
    """End communication, where it has begun, before the interpreter ends.

    Gloo's threads may still hold tensors of Python's: one that lets go of them while the interpreter is torn down ends
    a finished process by SIGABRT ('terminate called without an active exception', torch 2.13). After a failure (not
    `done`) only Gloo's communication ends: NCCL would wait for processes that are gone.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and (done or group.get_backend() == "gloo"):
        group.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
