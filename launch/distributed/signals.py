"""What happens to a process from outside while it trains: signals, a launcher that dies, another process that dies.

Python runs a signal handler only between two of its own instructions, and the main thread spends its time in
collectives and kernels. So a thread reads the signals from a pipe that the C handler writes to: it notes the first,
and ends the process at the second, whatever the main thread is doing.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from flexlora_ds.errors import RunError
from launch.distributed.agreement import gather
from launch.distributed.peers import Peers
from launch.distributed.process import Process
from launch.distributed.process_table import has_ended, launchers_above

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_POLL_SECONDS = 1.0
_SAME_SIGNAL_SECONDS = 0.3  # a scheduler and a launcher may both deliver one request


class SignalWatcher:
    """While active, the first SIGTERM, SIGUSR1 or SIGINT asks for a stop; the second ends the process at once.

    A launcher that dies asks for a stop as well: its processes would go on as orphans. A process of the run that dies,
    or a host that falls silent, ends this one with exit code 1, whatever collective it hangs in.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why a stop is asked for on this process; None while it is not."""
        self._launchers = launchers_above() if "LOCAL_RANK" in os.environ else []
        self._peers: Peers | None = None
        self._first = 0.0

    @property
    def stop(self) -> bool:
        """Whether a stop is asked for on this process."""
        return self.reason is not None

    def __enter__(self) -> SignalWatcher:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old = {number: signal.signal(number, _noted) for number in STOP_SIGNALS}
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        together = os.environ.get("WORLD_SIZE", "1") != "1"
        lost = self._lost_connection(error) if error and together and _is_lost_connection(error) else None
        self._leave.set()
        signal.set_wakeup_fd(self._old_wakeup)
        os.write(self._write, b"\0")
        self._thread.join()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)
        if self._peers is not None:
            self._peers.leave()
        if lost is not None:
            raise lost from error

    def follow(self, process: Process, timeout: float) -> None:
        """Begin to watch the other processes; one that gives no sign of life for `timeout` seconds is gone. Collective.

        Raises:
            RunError: the rendezvous cannot be reached.
        """
        if process.world_size > 1:
            self._peers = Peers(process, timeout)

    def say_ready(self, process: Process) -> None:
        """Say, for those who send signals, that from now on one ends in a stop that can be continued."""
        if process.is_rank_zero:
            print("signals: ready", file=sys.stderr, flush=True)

    def part(self, process: Process) -> None:
        """Wait for the others, and stop watching them: they may leave from now on; collective."""
        gather(process, "done")  # a barrier: who leaves earlier would look like one that died
        if self._peers is not None:
            self._peers.leave()
            self._peers = None

    def _run(self) -> None:
        while not self._leave.is_set():
            ready, _, _ = select.select([self._read], [], [], _POLL_SECONDS)
            for number in os.read(self._read, 64) if ready else b"":
                if number in STOP_SIGNALS:
                    self._signalled(signal.Signals(number))
            self._look_around()

    def _signalled(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.reason is None or not self._first:
            self._first = now
            self.reason = self.reason or number.name
        elif now - self._first > _SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    def _look_around(self) -> None:
        if self.reason is None and self._orphaned():
            self.reason = "the launcher is gone"
        peers = self._peers
        loss = peers.loss() if peers is not None else None
        if peers is not None and loss is not None and not self._leave.is_set():
            if peers.speaks:
                print("error:", loss, file=sys.stderr, flush=True)
                peers.tell(loss)
            else:
                peers.wait_for_speaker()
            os._exit(1)

    def _lost_connection(self, error: BaseException) -> RunError:
        """What the main thread says of a broken connection, where the thread finds nobody who is gone."""
        seen, peers = _first_line(error), self._peers
        if peers is None:
            fault = RunError(
                f"the processes did not all find each other ({seen})",
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
                "start the run on every host, and see that each can reach that address",
            )
            fault.said_here = os.environ.get("LOCAL_RANK", "0") == "0"
            return fault
        peers.hurry()
        time.sleep(peers.hurry_seconds)  # the thread says who is gone, and ends the process
        fault = _fault_of(seen)
        fault.said_here = peers.speaks
        peers.tell(str(fault))
        return fault

    def _orphaned(self) -> bool:
        if not self._launchers:
            return False
        return os.getppid() != self._launchers[0].pid or any(map(has_ended, self._launchers))


def _noted(number: int, frame: FrameType | None) -> None:
    """The thread does the work; without a handler of Python's, the C handler would write no byte."""


def _fault_of(seen: str) -> RunError:
    """A broken connection in our words, where nobody is gone."""
    if "timed out" in seen.lower():
        return RunError(
            f"the processes wait for each other: all give signs of life, and one hangs ({seen})",
            mend="look where it hangs (`py-spy dump`), then start the run again: it resumes",
        )
    return RunError(
        f"the connection to another process broke ({seen})", mend="start the run again: it resumes"
    )


def _is_lost_connection(error: BaseException) -> bool:
    marks = ("closed by peer", "connection reset", "broken pipe", "nccl", "gloo", "timed out", "timeout")
    return type(error).__name__.startswith("Dist") or (
        isinstance(error, RuntimeError)
        and not isinstance(error, RunError)
        and any(mark in str(error).lower() for mark in marks)
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def stop_line(reason: str | None, step: int) -> str:
    """What is said when a run stops."""
    return f"stopping after step {step}: {reason or 'asked on another process'}"
