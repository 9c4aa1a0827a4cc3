"""Real processes for tests: one per rank, gloo over the loopback interface, on the CPU.

`run_processes("tests.test_x:function", 2, …)` starts two processes, calls the function once in each and
returns what each returned. Importing torch and DeepSpeed takes seconds, so `Processes` keeps the same
processes for many calls:

    with Processes(2) as processes:
        first, second = processes.run(function, {"stage": 2})

The function sees RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as under a
launcher, and initialises communication itself (`deepspeed.init_distributed("gloo")` is harmless when
repeated). Arguments and results are JSON. `run_script` starts a script the same way and returns what it
printed and its exit codes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
OUTPUT_TAIL = 4000  # characters of a failed rank's output shown with its traceback
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Function = str | Callable[..., Any]


class ProcessError(AssertionError):
    """A rank raised, died or did not answer in time: which one, its traceback and the end of its output."""


@dataclass(frozen=True)
class ScriptResult:
    """One rank's exit code (negative: the signal that ended it) and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_processes(
    function: Function,
    world_size: int,
    *args: Any,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `function(*args)` once in each of `world_size` new processes; the results by rank.

    Raises ProcessError with the failing rank's traceback; after `timeout` seconds all processes are killed.
    """
    with Processes(world_size, timeout=timeout, env=env) as processes:
        return processes.run(function, *args)


def run_script(
    command: Sequence[str],
    world_size: int,
    *,
    timeout: float = 120,
    env: Mapping[str, str | None] | None = None,
) -> list[ScriptResult]:
    """Run `python *command` once per rank, from the repository's root, and wait for all; the results by rank.

    `env` changes the environment; None takes a variable out of it. No exit code is an error here. Raises ProcessError
    when a rank is still running after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        files: list[tuple[IO[str], IO[str]]] = []
        ranks: list[subprocess.Popen[str]] = []
        for variables in rank_environments(world_size, env):
            pair = stack.enter_context(scratch_file()), stack.enter_context(scratch_file())
            process = start_process([sys.executable, *command], variables, stdout=pair[0], stderr=pair[1])
            stack.callback(kill_group, process)
            files.append(pair)
            ranks.append(process)
        for rank, process in enumerate(ranks):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                message = f"rank {rank} still running after {timeout:g} s\n{tail_of(files[rank][1])}"
                raise ProcessError(message) from None
        return [
            ScriptResult(process.returncode, text_of(out), text_of(err))
            for process, (out, err) in zip(ranks, files, strict=True)
        ]


class Processes:
    """`world_size` processes that stay for many calls of `run`; restarted by the next call after a failure.

    `timeout` is in seconds per call (the first one includes the start); `env` is added to each process's
    environment.
    """

    def __init__(
        self, world_size: int, *, timeout: float = 120, env: Mapping[str, str] | None = None
    ) -> None:
        self.world_size = world_size
        self._timeout = timeout
        self._env = dict(env or {})
        self._workers: list[_Worker] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Function, *args: Any, timeout: float | None = None) -> list[Any]:
        """Call `function(*args)` once in every process; the results by rank. Raises ProcessError."""
        request = json.dumps({"function": _function_path(function), "args": args})
        if not self._workers:
            self._workers = [
                _Worker(variables) for variables in rank_environments(self.world_size, self._env)
            ]
        try:
            for worker in self._workers:
                worker.send(request)
            return self._collect(self._timeout if timeout is None else timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the processes and everything they started."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _collect(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        answers: dict[int, Any] = {}
        with selectors.DefaultSelector() as selector:
            for rank, worker in enumerate(self._workers):
                selector.register(worker.replies, selectors.EVENT_READ, rank)
            while len(answers) < self.world_size:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [rank for rank in range(self.world_size) if rank not in answers]
                    tails = "\n".join(self._workers[rank].tail() for rank in missing)
                    raise ProcessError(f"no answer from ranks {missing} after {timeout:g} s\n{tails}")
                for key, _ in ready:
                    answers[key.data] = self._answer(key.data)
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(self.world_size)]

    def _answer(self, rank: int) -> Any:
        worker = self._workers[rank]
        line = worker.replies.readline()
        if not line:
            raise ProcessError(f"rank {rank} died (exit code {worker.wait()})\n{worker.tail()}")
        reply = json.loads(line)
        if "error" in reply:
            raise ProcessError(f"rank {rank} failed\n{reply['error']}\n{worker.tail()}")
        return reply["result"]


class _Worker:
    """One process that answers requests, one JSON line each; its own output goes to a scratch file."""

    def __init__(self, variables: dict[str, str]) -> None:
        read_end, write_end = os.pipe()
        self.replies = os.fdopen(read_end)
        self._output = scratch_file()
        self._process = start_process(
            [sys.executable, "-m", "tests.helpers.processes", str(write_end)],
            variables,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end,),
        )
        os.close(write_end)

    def send(self, request: str) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        # A process that died answers by its closed pipe: the reader reports it, with its output.
        with contextlib.suppress(BrokenPipeError):
            stdin.write(request + "\n")
            stdin.flush()

    def wait(self) -> int:
        return self._process.wait(10)

    def tail(self) -> str:
        return tail_of(self._output)

    def close(self) -> None:
        kill_group(self._process)
        self.replies.close()
        self._output.close()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


def on_gpus(count: int = 1) -> dict[str, str]:
    """Environment (`env`) of processes that compute on the first GPUs of this machine; without it none sees any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:count]), "DS_ACCELERATOR": "cuda"}


def rank_environments(world_size: int, extra: Mapping[str, str | None] | None) -> Iterator[dict[str, str]]:
    """The environment of each rank, as a launcher sets it, on one machine and without a GPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        **os.environ,
        # DeepSpeed calls ninja by name, also where the environment was not activated.
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(extra or {}),
    }
    kept = {name: value for name, value in common.items() if value is not None}
    for rank in range(world_size):
        yield {**kept, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def start_process(command: Sequence[str], variables: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """Start a command in the repository's root, in a session of its own."""
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, start_new_session=True, **options)


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a process and those that it has started; wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def scratch_file() -> IO[str]:
    """A file for a process's output; it has no name."""
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def text_of(file: IO[str]) -> str:
    """What a process has written to a scratch file so far."""
    # Not seek and read: the process that writes shares the offset, and would go on at the beginning.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def tail_of(file: IO[str]) -> str:
    """The end of it."""
    return text_of(file)[-OUTPUT_TAIL:]


def _function_path(function: Function) -> str:
    if isinstance(function, str):
        return function
    if "." in function.__qualname__:
        raise ValueError(f"{function.__qualname__}: only a module's own functions can be called elsewhere")
    return f"{function.__module__}:{function.__qualname__}"


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends."""
    # Otherwise a killed test run would leave ranks behind, waiting for each other in a collective.
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(reply_descriptor: int) -> None:
    die_with_parent()
    with os.fdopen(reply_descriptor, "w") as replies:
        for line in sys.stdin:
            try:
                request = json.loads(line)
                module, _, name = request["function"].partition(":")
                result = getattr(importlib.import_module(module), name)(*request["args"])
                reply = json.dumps({"result": result})
            except Exception:
                reply = json.dumps({"error": traceback.format_exc()})
                sys.stdout.flush()  # for `tail`
            replies.write(reply + "\n")
            replies.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
