"""The commands that a demo runs: each is printed, run and timed; the first that fails ends the demo."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flexlora_ds.errors import RunError


def run_command(title: str, command: Sequence[str]) -> None:
    """Run `python *command` and print the seconds it took. Raises RunError naming the step when it fails."""
    print(f"\n== {title}\n$ python {shlex.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *command], check=False).returncode
    if code != 0:
        raise RunError(
            f"the step '{title}' ended with exit code {code}", "command above", "its own error is above"
        )
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


def training_command(recipe: Path, options: Sequence[str], *, processes: int | None = None) -> list[str]:
    """What `deepspeed launch/train.py …` runs, on a free port, so that several can run side by side.

    `processes` defaults to one per GPU, and to two without a GPU.
    """
    count = _default_processes() if processes is None else processes
    launcher = [
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(count),
        "--master_port",
        str(_free_port()),
    ]
    return [*launcher, "launch/train.py", "--ds", "ds_configs/zero2.json", "--recipe", str(recipe), *options]


def _default_processes() -> int:
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
