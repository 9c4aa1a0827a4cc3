"""The all-reduce of the start, by a stand-in clock; what a link should give, by what drivers and kernels print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.distributed.bandwidth import MESSAGE, Rate
from launch.distributed.link import Link, link_of_gpus, link_outside
from tests.helpers import startup_worker as worker
from tests.helpers.processes import Processes
from tests.helpers.training import Place, make_place

EIGHT_A100 = "8.0, 4, 16\n" * 8
NVSWITCH = (
    "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV12\t0-31\nGPU1\tNV12\t X \t0-31\nNIC0\tPXB\tPXB\n"
)
PCIE_ONLY = (
    "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tSYS\t0-31\nGPU1\tSYS\t X \t32-63\n\nLegend:\n\n  X    = Self\n"
)
TWO_BRIDGED_PAIRS = (
    "\tGPU0\tGPU1\tGPU2\tGPU3\n"
    "GPU0\tX\tNV4\tPHB\tPHB\nGPU1\tNV4\tX\tPHB\tPHB\nGPU2\tPHB\tPHB\tX\tNV4\nGPU3\tPHB\tPHB\tNV4\tX\n"
)


def test_the_rate_is_that_of_nccl_tests() -> None:
    """Bus bandwidth: 2 (n − 1)/n of the message over the time (nccl-tests, PERFORMANCE.md)."""
    assert Rate(10**9, 0.5, 2).bytes_per_s == 2e9
    assert Rate(10**9, 0.5, 8).bytes_per_s == 3.5e9


def test_a_stand_in_clock_gives_the_rate_on_all_processes(two_processes: Processes) -> None:
    for found in two_processes.run(worker.rate, 0.01):
        assert (found["size"], found["seconds"]) == (MESSAGE, 0.01)
        assert found["GB/s"] == pytest.approx(64 * 2**20 / 0.01 / 1e9)
        assert found["text"] == "64 MiB all-reduce over 2 processes: 10 ms, 6.71 GB/s"


def test_where_the_message_would_take_more_than_a_second_a_smaller_one_tells(
    two_processes: Processes,
) -> None:
    for found in two_processes.run(worker.rate, 0.08):
        assert found["text"] == "4 MiB all-reduce over 2 processes: 80 ms, 0.0524 GB/s"


@pytest.mark.parametrize(
    ("topology", "gpus", "name", "speed"),
    [
        (NVSWITCH, EIGHT_A100, "NVLink (12 links)", 300),
        (NVSWITCH.replace("NV12", "NV18"), "9.0, 5, 16\n" * 8, "NVLink (18 links)", 450),
        (PCIE_ONLY, "8.9, 4, 16\n8.9, 4, 8\n", "PCIe 4.0 x8", 15.76),
        (TWO_BRIDGED_PAIRS, "8.6, 4, 16\n" * 4, "PCIe 4.0 x16", 31.52),
    ],
)
def test_the_link_inside_a_host(topology: str, gpus: str, name: str, speed: float) -> None:
    link = link_of_gpus(topology, gpus)
    assert link is not None
    assert (link.name, link.gigabytes_per_s) == (name, pytest.approx(speed))


@pytest.mark.parametrize("gpus", ["", "[N/A], [N/A], [N/A]\n", "no devices were found\n"])
def test_a_driver_that_says_nothing_leads_to_no_link(gpus: str) -> None:
    assert link_of_gpus(PCIE_ONLY, gpus) is None
    assert link_of_gpus("", gpus) is None


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "name", "speed"),
    [
        (
            {
                "infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
                "infiniband/mlx5_0/ports/1/rate": "200 Gb/sec (4X HDR)\n",
                "infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
                "infiniband/mlx5_1/ports/1/rate": "400 Gb/sec (4X NDR)\n",
                "net/eth0/device/vendor": "0x15b3",
                "net/eth0/speed": "1000\n",
            },
            "InfiniBand of 200 Gb/s",
            25.0,
        ),
        (
            {
                "net/eth0/device/vendor": "0x15b3",
                "net/eth0/speed": "25000\n",
                "net/eth1/device/vendor": "0x15b3",
                "net/eth1/speed": "-1\n",
                "net/docker0/speed": "100000\n",
            },
            "Ethernet of 25 Gb/s",
            3.125,
        ),
    ],
)
def test_the_link_between_hosts(tmp_path: Path, files: dict[str, str], name: str, speed: float) -> None:
    link = link_outside(write(tmp_path, files))
    assert link is not None
    assert (link.name, link.gigabytes_per_s) == (name, speed)


def test_a_host_without_a_card_that_tells_its_speed(tmp_path: Path) -> None:
    assert link_outside(tmp_path) is None
    assert link_outside(write(tmp_path, {"net/eth0/device/x": "", "net/eth0/speed": "-1\n"})) is None


def test_the_doubt_names_what_is_set() -> None:
    link, slow, fast = Link("NVLink (12 links)", 300.0, 0.25), Rate(MESSAGE, 0.01, 8), Rate(MESSAGE, 7e-4, 8)
    assert link.doubt(fast, {"NCCL_P2P_DISABLE": "1"}) is None
    doubt = link.doubt(slow, {})
    assert doubt is not None
    assert doubt.endswith("and at least 75; NCCL_DEBUG=INFO shows the path that NCCL takes")
    doubt = link.doubt(slow, {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0", "NCCL_SHM_DISABLE": "1"})
    assert doubt is not None
    assert doubt.endswith("; NCCL_P2P_DISABLE=1, NCCL_SHM_DISABLE=1 is set")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.mark.complaint("LLaMA-Factory 3499", "LLaMA-Factory 7584", "DeepSpeed 6507")
def test_a_run_says_the_rate_and_warns_below_its_link(
    two_processes: Processes, place: Place, tmp_path: Path
) -> None:
    arguments = place.arguments(tmp_path / "run", max_steps=1, adjust_size=0)
    result, _ = two_processes.run(worker.on_a_slow_link, arguments, 0.005)
    assert result["code"] == 0, result["stderr"]
    said = "64 MiB all-reduce over 2 processes: 5 ms, 13.4 GB/s"
    assert f"{said}\n" in result["stderr"]
    assert f"warning: {said}, though NVLink (12 links) should give up to 300 GB/s" in result["stderr"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert any(text.startswith(said) for text in summary["warnings"])
