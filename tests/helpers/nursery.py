"""Training processes without the seconds of importing torch and DeepSpeed: forked from one that has done it.

`Nursery` starts such a process; `start` gives a child of it the face of a `subprocess.Popen`. The child has its own
session, environment and output, and runs `python -m MODULE ARGUMENTS` from there; it ends as that would.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from tests.helpers.processes import ROOT, die_with_parent, kill_group, scratch_file, start_process, tail_of

POLL_SECONDS = 0.02


class Child:
    """One process of a nursery."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end; subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, if it still runs, and wait for that."""
        self.send_signal(signal.SIGKILL)
        self.wait(60)


class Nursery:
    """The process that has imported everything; started when first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] = scratch_file()

    def start(
        self, module: str, arguments: Sequence[str], variables: Mapping[str, str], output: IO[str]
    ) -> Child:
        """Fork a child that runs `python -m module arguments`."""
        path = f"/proc/{os.getpid()}/fd/{output.fileno()}"
        request = {"module": module, "arguments": list(arguments), "variables": dict(variables)}
        return Child(self, self.ask(request | {"output": path}))

    def ask(self, request: Mapping[str, Any]) -> Any:
        """One question, one answer."""
        if self._process is None:
            self._process = start_process(
                [sys.executable, "-m", "tests.helpers.nursery"],
                {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, tail_of(self._errors)
        return json.loads(answer)

    def close(self) -> None:
        """End the process; its children end with it."""
        if self._process is not None:
            kill_group(self._process)


def _serve() -> None:
    """Answer requests; in a child, return to run what was asked for."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
                return
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
    os._exit(0)


def _become(request: Mapping[str, Any]) -> None:
    """The child's own session, environment and output."""
    os.setsid()
    die_with_parent()
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["variables"])
    sys.argv = [request["module"], *request["arguments"]]


def main() -> None:
    """Import, serve, and in a child run."""
    die_with_parent()
    from launch.command import quiet_libraries

    quiet_libraries()
    import deepspeed
    import peft
    import transformers

    import launch.loop.session

    assert deepspeed and peft and transformers and launch.loop.session
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not live on in a child"  # noqa: PTH208
    _serve()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
