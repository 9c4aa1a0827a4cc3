"""A SLURM of two nodes for the batch scripts: commands that answer as SLURM 22.05 did, and record what they are asked.

`srun` starts the task of each node here, `scancel` signals them, `scontrol` answers from texts that were recorded.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.processes import ROOT

ENVIRONMENT = {
    "SLURM_JOB_ID": "31007",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
}
"""What the batch shell of a job gets, as far as the scripts could read it."""

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
    echo $! >> tasks
done
code=0
for task in $(cat tasks); do wait "$task" || code=$?; done
exit $code
"""

SCANCEL = """#!/bin/bash
echo "scancel $*" >> asked
((UNREACHABLE)) && exit 1
kill -s "${1#--signal=}" $(cat tasks)
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo n1; sleep 0.1; echo n2 ;;  # a long list is written in parts
    "show node") printf '   Gres=(null)\\n   NodeAddr=10.0.0.1 NodeHostName=vm Port=17001 Version=22.05.8\\n' ;;
    "show job") printf '   PreemptEligibleTime=2026-11-27T14:08:52 PreemptTime=%s\\n' "$PREEMPTED" ;;
    requeue*) echo "scontrol $*" >> asked; exit "$REFUSED" ;;
esac
"""

PYTHON = """#!{python} -IS
import os, signal, sys, time
with open("launcher-" + os.environ["SLURM_NODEID"], "w") as file:
    print(*sys.argv[1:], sep="\\n", file=file)
# As torchrun and the training processes below it together: a run that USR1 stops ends well, TERM is a failure.
ignored = signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0 if ignored else 138))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
open("ready-" + os.environ["SLURM_NODEID"], "w").close()
time.sleep({seconds})
sys.exit({code})
"""


class Job:
    """A batch job that runs: its shell, and what its commands recorded in `folder`."""

    def __init__(self, folder: Path, script: str, *words: str, environment: dict[str, str]) -> None:
        self.folder = folder
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self._shell = subprocess.Popen(
            ["bash", f"launch/slurm/{script}", *words],
            cwd=folder,
            env=variables | ENVIRONMENT | {"PATH": path} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Wait until the tasks of both nodes run."""
        while not all((self.folder / f"ready-{node}").exists() for node in (0, 1)):
            assert self._shell.poll() is None, self._shell.communicate()[0]
            time.sleep(0.01)

    def signal_shell(self, number: signal.Signals) -> None:
        """As `--signal=B:…` and `scancel --batch` do."""
        self._shell.send_signal(number)

    def signal_tasks(self, number: signal.Signals) -> None:
        """As SLURM does by itself, before a preemption for instance."""
        for pid in (self.folder / "tasks").read_text().split():
            os.kill(int(pid), number)

    def end(self) -> tuple[int, str]:
        """Wait for the end: exit code and output."""
        said, _ = self._shell.communicate(timeout=60)
        return self._shell.returncode, said

    @property
    def asked(self) -> list[str]:
        """What SLURM was asked to change."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def launcher(self, node: int) -> list[str]:
        """The words that Python was started with on a node."""
        return (self.folder / f"launcher-{node}").read_text().splitlines()


def submit(
    folder: Path,
    script: str,
    *words: str,
    seconds: float = 60,
    code: int = 0,
    preempted: str = "None",
    refused: bool = False,
    unreachable: bool = False,
    **environment: str,
) -> Job:
    """Start a script's job in a new folder; the run ends after `seconds` by itself, with `code`."""
    (folder / "bin").mkdir()
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "launch").symlink_to(ROOT / "launch")
    python = PYTHON.format(python=sys.executable, seconds=seconds, code=code)
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        _write_program(folder / "bin" / name, text)
    _write_program(folder / ".venv" / "bin" / "python", python)
    answers = {"PREEMPTED": preempted, "REFUSED": f"{refused:d}", "UNREACHABLE": f"{unreachable:d}"}
    return Job(folder, script, *words, environment=answers | environment)


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
