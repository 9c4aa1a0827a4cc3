"""The trackers of a run, each a process beside it: none of them can end the run, change it or hold it up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flexlora_ds.terminal.plain_text import one_line

_ROOT = Path(__file__).parents[2]
_LONGEST = 300
"""Characters of a tracker's last line in our warning."""


class Trackers:
    """The tracker processes of a run; process 0 alone has any.

    Args:
        names: which trackers.
        run: the run folder, whose logs they read.
        after: the run goes on after this step; None: it begins.
        warn: gets one line for each tracker that fails.
    """

    def __init__(
        self, names: Sequence[str], run: Path, after: int | None, warn: Callable[[str], None]
    ) -> None:
        self._run, self._warn = run, warn
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in dict.fromkeys(names):
            try:
                self._processes[name] = self._start(name, after)
            except OSError as error:
                self._fail(name, f"could not start: {error.strerror}")

    def _start(self, name: str, after: int | None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "launch.trackers", name, str(self._run.resolve()), "--follow"]
        command += [] if after is None else ["--after", str(after)]
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._log(name).parent.mkdir(exist_ok=True)
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # Ctrl-C is for the run
            )

    def look(self) -> None:
        """Say which trackers have ended since the last look; for every logged step, as it waits for nothing."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                self._fail(name, f"has ended: {self._last_line(name, process.returncode)}")

    def close(self, seconds: float) -> None:
        """Let them write the rest, for `seconds` at most."""
        deadline = time.monotonic() + seconds
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for name, process in list(self._processes.items()):
            try:
                if process.wait(max(0.0, deadline - time.monotonic())):
                    self._fail(name, f"has failed: {self._last_line(name, process.returncode)}")
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # a library's own service too
                process.wait()
                self._fail(name, f"was not done {seconds:.0f} s after the run")
        self._processes.clear()

    def _fail(self, name: str, what: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None and process.stdin is not None:
            process.stdin.close()
        again = f"python -m launch.trackers {name} {self._run} tells it what it lacks"
        self._warn(f"tracker {name} {what}; the run goes on without it; {again}")

    def _last_line(self, name: str, code: int) -> str:
        """What it said of its end: its error, or whatever it said last."""
        lines = [line for line in self._log(name).read_text(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        said = (errors or lines)[-1:] or [f"exit code {code}" if code >= 0 else f"signal {-code}"]
        return one_line(said[0].removesuffix("; --debug true shows where"), _LONGEST)

    def _log(self, name: str) -> Path:
        return self._run / "tracking" / f"{name}.log"
