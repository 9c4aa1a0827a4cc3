"""Who takes part in a run: its processes, and the hosts that they are on."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import psutil

from launch.distributed.agreement import gather
from launch.distributed.process import Process


@dataclass(frozen=True)
class Member:
    """A process of the run, as the others know it."""

    rank: int
    pid: int
    started: float
    """Seconds since 1970."""
    host: str
    address: str
    """The address from which the host reaches process 0."""
    machine: str
    """The same for all processes of a host, and for no other: hosts of one name exist."""

    @property
    def on_host(self) -> str:
        """The host, in words."""
        return f"host {self.host} ({self.address})" if self.address else f"host {self.host}"


def gather_members(process: Process) -> list[Member]:
    """All processes of the run, by rank; collective."""
    host = socket.gethostname()
    started = psutil.Process().create_time()
    me = Member(process.rank, os.getpid(), started, host, _own_address(), f"{host} {_machine()}")
    return [Member(**member) for member in gather(process, asdict(me))]


def in_words(lost: Sequence[Member], members: Sequence[Member]) -> list[str]:
    """Who is lost: whole hosts where every process of one is, else processes.

    Args:
        lost: some of `members`, which are all processes of the run.
    """
    sizes = {m.machine: sum(other.machine == m.machine for other in members) for m in members}
    words: list[str] = []
    for machine, group in groupby(sorted(lost, key=lambda m: (m.machine, m.rank)), lambda m: m.machine):
        here = list(group)
        if len(sizes) > 1 and len(here) == sizes[machine]:
            words.append(_host_in_words(here))
        else:
            words += [_process_in_words(member, several_hosts=len(sizes) > 1) for member in here]
    return words


def _host_in_words(here: Sequence[Member]) -> str:
    ranks = ", ".join(str(member.rank) for member in here)
    if here[0].rank == 0:
        return f"{here[0].on_host}, which holds process 0 and the rendezvous,"
    return f"{here[0].on_host} with process{'es' * (len(here) > 1)} {ranks}"


def _process_in_words(member: Member, *, several_hosts: bool) -> str:
    place = f" on {member.on_host}" if several_hosts else ""
    return f"process {member.rank} (pid {member.pid}){place}"


def _machine() -> str:
    """What tells a machine from another of its name, and a container with a network of its own from its neighbour."""
    marks = []
    with contextlib.suppress(OSError):
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        marks.append(str(Path("/proc/self/ns/net").readlink()))
    return " ".join(marks)


def _own_address() -> str:
    with contextlib.suppress(OSError):
        target = os.environ.get("MASTER_ADDR", "127.0.0.1")
        family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: the kernel only chooses the way
            return str(probe.getsockname()[0])
    return ""
