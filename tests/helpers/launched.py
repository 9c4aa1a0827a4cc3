"""Training processes that a test sends signals to while they run."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.helpers.nursery import Nursery
from tests.helpers.processes import kill_group, rank_environments, scratch_file, start_process, text_of

POLL_SECONDS = 0.01


@dataclass
class Launched:
    """The processes of one run, by rank, and what each has written so far."""

    processes: list[Any]
    """Each a `subprocess.Popen`, or a `Child` of a nursery."""
    outputs: list[IO[str]]

    def said(self, rank: int = 0) -> str:
        """What a process has written to stdout and stderr."""
        return text_of(self.outputs[rank])

    def wait_for(self, condition: Callable[[], bool], timeout: float = 240, *, orphans: bool = False) -> None:
        """Wait until `condition` holds; AssertionError if the run ends (unless `orphans` go on) or the time is up."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert orphans or any(p.poll() is None for p in self.processes), self.said()
            time.sleep(POLL_SECONDS)

    def wait_for_text(self, text: str) -> None:
        """Wait until process 0 has written `text`."""
        self.wait_for(lambda: text in self.said())

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some processes, or to all."""
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                self.processes[rank].send_signal(number)

    def wait(self, timeout: float = 120) -> list[int]:
        """Wait for the end of all; their exit codes."""
        deadline = time.monotonic() + timeout
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]


@contextmanager
def launched(
    arguments: Sequence[str], world_size: int, script: str = "launch/train.py"
) -> Iterator[Launched]:
    """Start a training script in real processes; what still runs at the end is killed."""
    with contextlib.ExitStack() as stack:
        run = Launched([], [])
        for variables in rank_environments(world_size, None):
            output = stack.enter_context(scratch_file())
            process = start_process(
                [sys.executable, script, *arguments], variables, stdout=output, stderr=output
            )
            stack.callback(kill_group, process)
            run.processes.append(process)
            run.outputs.append(output)
        yield run


@dataclass
class Held:
    """A run whose process of one rank waits at a moment (`tests.helpers.moments`)."""

    run: Launched
    folder: Path

    def wait(self) -> None:
        """Wait until the moment has come."""
        self.run.wait_for((self.folder / "held").exists)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some processes, or to all, and wait until each has taken notice."""
        chosen = ranks or range(len(self.run.processes))
        self.run.send(number, *chosen)
        self.run.wait_for(lambda: all((self.folder / f"noted-{rank}").exists() for rank in chosen))

    def let_go(self) -> None:
        """Let the process go on."""
        (self.folder / "go").touch()


@contextmanager
def held(
    nursery: Nursery, arguments: Sequence[str], world_size: int, moment: str, rank: int, folder: Path
) -> Iterator[Held]:
    """Start a run whose process `rank` stops at a moment; `folder` is for the notes between it and the test."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        run = Launched([], [])
        for variables in rank_environments(world_size, None):
            output = stack.enter_context(scratch_file())
            words = [moment, str(rank), str(folder), *arguments]
            child = nursery.start("tests.helpers.moments", words, variables, output)
            stack.callback(child.kill)
            run.processes.append(child)
            run.outputs.append(output)
        held = Held(run, folder)
        held.wait()
        yield held


def lines(path: Path) -> int:
    """How many lines a log has by now."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
