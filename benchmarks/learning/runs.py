"""Training runs in processes of their own; what has finished is not repeated."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.learning.settings import FIXED, SETTINGS
from flexlora_ds.errors import RunError, UserError
from flexlora_ds.files.reading import read_text
from launch.options.train_options import TrainOptions, parse_options

_OF_NO_CONSEQUENCE = frozenset(
    ("out", "recipe", "resume", "save_every", "keep_checkpoints", "timeout", "debug", "dry_run")
)
"""Options that change nothing of what a run learns or logs."""


@dataclass(frozen=True)
class Run:
    """One run: a setting, a seed and a learning rate."""

    setting: str
    seed: int
    rate: str | None = None
    """As it was written; None: that of the other options."""
    rank: int | None = None
    """In place of the setting's, at the same scale alpha / rank."""

    @property
    def path(self) -> Path:
        """Below the folder of all runs."""
        size = "" if self.rank is None else f"-rank-{self.rank}"
        name = f"{self.setting}{size}-{self.seed}"
        return Path(name) if self.rate is None else Path(f"lr{self.rate}", name)


@dataclass(frozen=True)
class Runner:
    """Where runs go, what all of them are told, and how many there are at a time."""

    out: Path
    words: tuple[str, ...] = ()
    """Options of `launch/train.py` for all runs."""
    jobs: int = 1
    seconds: float | None = None
    """A run that takes longer is ended; None: no run is."""

    def folder(self, run: Run) -> Path:
        """Where a run lies, or will lie."""
        return self.out / run.path

    def train_all(self, runs: Iterable[Run]) -> dict[Run, Path]:
        """The folders of these runs, each trained where it has not finished.

        Raises:
            RunError, UserError: as `train`, of the first that failed, when the others have ended.
        """
        wanted = list(dict.fromkeys(runs))
        with ThreadPoolExecutor(self.jobs) as pool:
            return dict(zip(wanted, pool.map(self.train, wanted), strict=True))

    def train(self, run: Run) -> Path:
        """One run in a process of its own, resumed from its last checkpoint; returns its folder.

        Raises:
            RunError: it failed; the message ends with what it said last.
            UserError: its folder holds a run with other options.
        """
        folder, words = self.folder(run), self.arguments(run)
        require_same_options(folder, words)
        if self.finished(run):
            return folder
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        try:
            done = subprocess.run(
                [sys.executable, "launch/train.py", *words],
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "MASTER_PORT": str(_free_port())},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=self.seconds,
            )
        except subprocess.TimeoutExpired:
            raise RunError(
                f"{folder} was ended after {self.seconds:.0f} s", mend="give it more time"
            ) from None
        if done.returncode:
            last = (done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise RunError(f"{folder} ended with {done.returncode}: {last}")
        if not self.finished(run):
            raise RunError(f"{folder} was stopped before its last step", mend="start the command again")
        print(f"{folder}: done", file=sys.stderr, flush=True)
        return folder

    def finished(self, run: Run) -> bool:
        """Whether a run has reached its last step."""
        summary = self.folder(run) / "summary.json"
        return summary.exists() and '"state": "finished"' in summary.read_text(encoding="utf-8")

    def arguments(self, run: Run) -> list[str]:
        """The words after `launch/train.py`; of a repeated option the last one counts."""
        words = [*_words({**FIXED, **SETTINGS[run.setting]}), *self.words]
        words += _words({"seed": run.seed, "out": self.folder(run)})
        if run.rate is not None:
            words += _words({"lr": run.rate})
        if run.rank is not None:
            whole = parse_options(words)
            words += _words({"rank": run.rank, "alpha": whole.alpha / whole.rank * run.rank})
        return words


def require_same_options(folder: Path, words: list[str]) -> None:
    """See that a run that lies in `folder` already was told the same, apart from what is of no consequence.

    Raises:
        UserError: it was not; or its options cannot be read.
    """
    path = folder / "options.yaml"
    if not path.exists():
        return
    kept = TrainOptions.from_yaml(read_text(path, "remove the run"), str(path))
    asked = parse_options(words)
    for key in asked.places:
        value, there = getattr(asked, key), getattr(kept, key)
        # What was left to the run, and the prompt of chats, is written down as the run resolved it.
        if key in _OF_NO_CONSEQUENCE or value in ("auto", there) or (key, there) == ("prompt", "chat"):
            continue
        raise UserError(
            f"the run there has {key} {there}, and {key} {value} is asked for",
            str(folder),
            "choose another --out, or remove that run",
        )


def _words(options: Mapping[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items()]


def _free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
