"""Which GPU a process takes, and GPUs that torch cannot use, by stand-ins for the driver, torch and the launcher."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flexlora_ds.devices import count_gpus, gpu_of_process
from flexlora_ds.errors import UserError

LISTED = "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)\nGPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-2)\n"
LAUNCHERS = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", *LAUNCHERS):
        monkeypatch.delenv(name, raising=False)


def driver_says(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a command `nvidia-smi` first on PATH."""
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def torch_finds_none(monkeypatch: pytest.MonkeyPatch, *, cuda: str | None, fault: str = "") -> None:
    def init() -> None:
        if fault:
            raise RuntimeError(fault)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by "
    "downloading and installing a new version from the URL: …"
)


@pytest.mark.parametrize(
    ("cuda", "fault", "reason"),
    [
        (None, "", "it is built without CUDA"),
        ("13.0", OLD_DRIVER, "The NVIDIA driver on your system is too old (found version 12040)"),
        ("13.0", "No CUDA GPUs are available\nmore", "No CUDA GPUs are available"),
        ("13.0", "", "it finds none"),
    ],
)
def test_gpus_that_torch_cannot_use_are_an_error(
    cuda: str | None, fault: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on the CPU of a machine with eight GPUs would take its whole time for nothing."""
    driver_says(LISTED, tmp_path, monkeypatch)
    torch_finds_none(monkeypatch, cuda=cuda, fault=fault)
    with pytest.raises(UserError) as refused:
        count_gpus()
    assert str(refused.value) == (
        f"2 GPUs here (NVIDIA A100-SXM4-80GB), and torch {torch.__version__} cannot use them: {reason} (torch); "
        "install a torch that fits the driver, or set DS_ACCELERATOR=cpu to compute on the CPU"
    )


def test_a_number_that_no_gpu_has_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver_says(LISTED, tmp_path, monkeypatch)
    torch_finds_none(monkeypatch, cuda="13.0", fault="No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match=r"No CUDA GPUs are available \(CUDA_VISIBLE_DEVICES is '7'\)"):
        count_gpus()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_no_fault(hidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver_says(LISTED, tmp_path, monkeypatch)
    torch_finds_none(monkeypatch, cuda=None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert count_gpus() == 0


@pytest.mark.parametrize("text", ["", "No devices found.\n"])
def test_a_driver_without_gpus_is_no_fault(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver_says(text, tmp_path, monkeypatch)
    torch_finds_none(monkeypatch, cuda=None)
    assert count_gpus() == 0


def test_a_wish_for_the_cpu_hides_gpus_from_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the model would be on the GPU, and DeepSpeed on the CPU."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    assert count_gpus() == 0
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("gpus", "launcher", "expected"),
    [
        (1, {}, 0),
        (8, {"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}, 5),
        (8, {"LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, 1),
        (8, {"LOCAL_RANK": "3"}, 3),
        (1, {"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}, 0),  # each sees its own
    ],
)
def test_a_process_takes_the_gpu_of_its_number(
    gpus: int, launcher: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert gpu_of_process(gpus) == expected


@pytest.mark.parametrize("size", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
@pytest.mark.parametrize("local_rank", ["0", "7"])
def test_more_processes_than_gpus_are_refused_by_each(
    local_rank: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv(size, "8")
    with pytest.raises(UserError, match=r"8 processes on a machine with 4 GPUs .*; start 4 there, one for"):
        gpu_of_process(4)
