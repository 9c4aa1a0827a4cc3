"""What connects the processes of a run, and how fast it should be: by what the driver and the kernel say of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flexlora_ds.devices import nvidia_smi
from launch.distributed.agreement import gather
from launch.distributed.bandwidth import Rate
from launch.distributed.members import Member
from launch.distributed.process import Process

_NVLINK = {"8.6": 14.0, "10.0": 50.0, "10.3": 50.0}
"""GB/s of one NVLink in one direction, by compute capability, where it is not 25."""
_PCIE_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.97, 5: 3.94, 6: 7.56}
"""GB/s of one lane in one direction, by generation."""
_SPOILERS = (
    "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_LEVEL",
    "NCCL_SOCKET_IFNAME",
)
"""Settings of NCCL's that keep it from the best path."""


@dataclass(frozen=True)
class Link:
    """One kind of connection."""

    name: str
    gigabytes_per_s: float
    """In one direction, as it is sold."""
    part: float
    """Of it, what an all-reduce of 64 MiB reaches at least where nothing is wrong."""

    def doubt(self, rate: Rate, environment: Mapping[str, str]) -> str | None:
        """A warning where less is reached, and what may be the reason."""
        if rate.bytes_per_s / 1e9 >= self.part * self.gigabytes_per_s:
            return None
        set_here = [f"{key}={environment[key]}" for key in _SPOILERS if environment.get(key, "0") != "0"]
        reason = (
            f"{', '.join(set_here)} is set" if set_here else "NCCL_DEBUG=INFO shows the path that NCCL takes"
        )
        return (
            f"{rate}, though {self.name} should give up to {self.gigabytes_per_s:.3g} GB/s, "
            f"and at least {self.part * self.gigabytes_per_s:.3g}; {reason}"
        )


def find_link(process: Process, members: Sequence[Member]) -> Link | None:
    """What is between the processes, the slowest of several hosts'; collective.

    None without GPUs, or where nothing says. The first process of each host looks.
    """
    if process.device.type != "cuda":
        return None
    hosts = {member.machine for member in members}
    me = members[process.rank]
    looks = me == next(member for member in members if member.machine == me.machine)
    seen = (link_inside() if len(hosts) == 1 else link_outside()) if looks else None
    found = [Link(**link) for link in gather(process, asdict(seen) if seen else None) if link]
    # A host that says nothing may be the slowest.
    return min(found, key=lambda link: link.part * link.gigabytes_per_s) if len(found) == len(hosts) else None


def link_inside() -> Link | None:
    """Between the GPUs of this host."""
    query = "--query-gpu=compute_cap,pcie.link.gen.max,pcie.link.width.max"
    return link_of_gpus(nvidia_smi("topo", "-m"), nvidia_smi(query, "--format=csv,noheader"))


def link_of_gpus(topology: str, gpus: str) -> Link | None:
    """NVLink where it joins every two GPUs, else PCIe.

    Args:
        topology: what `nvidia-smi topo -m` says; a cell is `NV12`, `PIX`, `SYS`, `X`, …
        gpus: a line for each GPU: compute capability, PCIe generation, lanes.
    """
    rows = [line.split() for line in topology.splitlines() if re.match(r"GPU\d+\s.*\bX\b", line)]
    cells = [cell for row in rows for cell in row[1 : len(rows) + 1] if cell != "X"]
    described = [[cell.strip() for cell in line.split(",")] for line in gpus.splitlines() if line.strip()]
    try:
        if cells and all(re.fullmatch(r"NV\d+", cell) for cell in cells):
            count = min(int(cell[2:]) for cell in cells)
            return Link(f"NVLink ({count} links)", count * _NVLINK.get(described[0][0], 25.0), 1 / 4)
        slowest = min((_PCIE_LANE[int(gen)] * int(lanes), gen, lanes) for _, gen, lanes in described)
    except (ValueError, KeyError, IndexError):
        return None
    return Link(f"PCIe {slowest[1]}.0 x{slowest[2]}", slowest[0], 1 / 8)


def link_outside(system: Path = Path("/sys/class")) -> Link | None:
    """Between this host and others: the fastest InfiniBand port that is up, else the fastest Ethernet card.

    Args:
        system: where the kernel describes its devices.
    """
    ports = [port for port in system.glob("infiniband/*/ports/*") if "ACTIVE" in _text(port / "state")]
    rates = [float(match[0]) for port in ports if (match := re.match(r"[\d.]+", _text(port / "rate")))]
    if rates:
        return Link(f"InfiniBand of {max(rates):g} Gb/s", max(rates) / 8, 1 / 4)
    cards = [card for card in system.glob("net/*") if (card / "device").exists()]
    speeds = [int(speed) for card in cards if (speed := _text(card / "speed").strip()).isdecimal()]
    if not any(speeds):
        return None
    return Link(f"Ethernet of {max(speeds) / 1000:g} Gb/s", max(speeds) / 8000, 1 / 8)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):  # a card that is down has no speed
        return path.read_text()
    return ""
