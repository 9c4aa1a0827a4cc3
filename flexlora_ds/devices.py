"""The GPU that a process computes on, by what torch, the driver and the launcher say of it; and its memory's end."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Mapping

import torch

from flexlora_ds.errors import CommandError, UserError
from flexlora_ds.launcher import number_in_environment
from flexlora_ds.terminal.counted import counted

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
"""Words of torch's errors, and of the libraries below it."""
_CPU_WANTED = "set DS_ACCELERATOR=cpu to compute on the CPU"


def count_gpus() -> int:
    """How many GPUs this process may use; 0 where there is none, or the environment has DS_ACCELERATOR=cpu.

    Raises:
        UserError: the machine has GPUs that torch cannot use. A day on its CPU would be nobody's wish.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # torch must not find one either; it looks when it is first asked.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return 0
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if (gpus := _gpus_of_driver(os.environ)) and torch.version.hip is None:
        them = "it" if len(gpus) == 1 else "them"
        raise UserError(
            f"{counted(len(gpus), 'GPU')} here ({gpus[0]}), and torch {torch.__version__} cannot use {them}: "
            f"{_reason()}",
            "torch",
            f"install a torch that fits the driver, or {_CPU_WANTED}",
        )
    return 0


def gpu_of_process(gpus: int) -> int:
    """The number of this process's GPU, among the `gpus` that it sees.

    A launcher shows each process all GPUs of its machine, or only its own (SLURM's `--gpus-per-task`).

    Raises:
        UserError: the machine runs more processes than it has GPUs; on all of its processes alike.
    """
    if gpus == 1:
        return 0
    local_rank = number_in_environment("LOCAL_RANK", 0)
    said = [number_in_environment(name, 1) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")]
    processes = max(local_rank + 1, *said)
    if processes > gpus:
        raise UserError(
            f"{processes} processes on a machine with {gpus} GPUs",
            "environment",
            f"start {gpus} there, one for each GPU",
        )
    return local_rank


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a foreign exception means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError):
        return True
    foreign = isinstance(error, RuntimeError) and not isinstance(error, CommandError)
    return foreign and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def nvidia_smi(*arguments: str) -> str:
    """What the driver's command prints; nothing where there is none, or it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=5, check=True
        ).stdout
    return ""


def _gpus_of_driver(environment: Mapping[str, str]) -> list[str]:
    """The names of the machine's GPUs, unless they are hidden from this process."""
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return []
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", nvidia_smi("-L"), re.MULTILINE)


def _reason() -> str:
    """Why torch finds no GPU, in one line."""
    if torch.version.cuda is None:
        return "it is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().split("\n")[0].split(". ")[0]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return first if visible is None else f"{first} (CUDA_VISIBLE_DEVICES is {visible!r})"
    return "it finds none"
