"""The same command in several processes that find each other, as under a launcher; the output of each kept apart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

from flexlora_ds.errors import RunError, UserError


def run_together(command: Sequence[str], processes: int, *, cpu: bool, place: str) -> list[str]:
    """Run `python *command` in each process; the last line that each printed, by rank.

    `cpu` hides the GPUs. `place` ends the message of a failure.

    Raises:
        UserError, RunError: one process ended with 2, or with another code; its own last line, after the others, which
            would wait for it, have been ended.
    """
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    common |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if cpu else {}
    with ExitStack() as stack:
        started = []
        for rank in range(processes):
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            worker = subprocess.Popen([sys.executable, *command], stdout=out, stderr=err, env=common | own)
            stack.callback(worker.wait)
            stack.callback(worker.kill)
            started.append((worker, out, err))
        while any(worker.poll() is None for worker, *_ in started):
            if any(worker.poll() not in (None, 0) for worker, *_ in started):
                break
            time.sleep(0.1)
        for worker, _, err in started:
            if worker.poll() not in (None, 0):
                _fail(worker.returncode, _text(err), place)
        return [_text(out).strip().splitlines()[-1] for _, out, _ in started]


def _fail(code: int, errors: str, place: str) -> NoReturn:
    last = (errors.strip().splitlines() or ["it said nothing"])[-1]
    raise (UserError if code == 2 else RunError)(f"a process ended with exit code {code}", place, last)


def _text(file: Any) -> str:
    # Not seek and read: a process that still writes shares the offset.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
