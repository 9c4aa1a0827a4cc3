"""The training command, held at a chosen moment: what the tests aim their signals and kills at.

    python -m tests.helpers.moments MOMENT RANK FOLDER ARGUMENTS...

The process of that rank writes FOLDER/held at the moment, and waits until FOLDER/go is there. Every process writes
FOLDER/noted-RANK when it has taken notice of a signal. So nothing depends on how fast the machine is.

Moments: `data`, `start-up`, `step N` (between the backward pass and the update), `validation N`, `rank change N` (the
parameters have their new shapes, their state is not written back), `save N` (its file is written, not yet synced),
`operation N` (the N-th thing that the process does to a file of a save).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Hold:
    """Stops the process that comes to it, once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self) -> None:
        """Say so, and wait."""
        held = self._folder / "held"
        if held.exists():
            return
        held.touch()
        while not (self._folder / "go").exists():
            time.sleep(0.02)

    def before(self, function: Callable[..., Any], due: Callable[..., bool]) -> Callable[..., Any]:
        """`function`, held before its first call for which `due` holds."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if due(*args):
                self()
            return function(*args, **kwargs)

        return call


def hook(moment: str, hold: Hold) -> Any:
    """The patch that holds at a moment."""
    from flexlora_ds.checkpoint import state
    from flexlora_ds.partitions import rebuild
    from launch import train
    from launch.loop import run_log, session, validation

    kind, _, number = moment.rpartition(" ")
    step = int(number) if number.isdigit() else 0
    always: Callable[..., bool] = lambda *_: True  # noqa: E731
    places: dict[str, tuple[Any, str, Callable[..., bool]]] = {
        "data": (train, "prepare_data", always),
        "start-up": (session, "build_engine", always),
        "step": (
            run_log.RunLog,
            "before_update",
            lambda log: (
                log.engine.global_steps + 1 == step and log.engine.is_gradient_accumulation_boundary()
            ),
        ),
        "validation": (validation, "token_loss", lambda engine, *_: engine.global_steps == step),
        "rank change": (rebuild, "write_back", lambda engine, *_: engine.global_steps == step),
        "save": (
            state,
            "seal",
            lambda path: path.suffix == ".safetensors" and f"{step:08d}" in path.parent.name,
        ),
    }
    owner, name, due = places[kind if step else moment]
    return patch.object(owner, name, hold.before(getattr(owner, name), due))


def watch_files(count: int, hold: Hold) -> None:
    """Hold at the `count`-th operation on a file of a save."""
    seen = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        # What a start opens to check is no part of a save, whose files are below `.step_…` until it is complete.
        path = str(args[0]) if event in _FILE_EVENTS else ""
        saves = "/.step_" in path or "/.latest" in path or event != "open"
        if "checkpoints" in path and saves:
            seen += 1
            if seen == count:
                hold()

    sys.addaudithook(audit)


def main() -> int:
    """Train, held where the command line says."""
    moment, rank, place, *arguments = sys.argv[1:]
    folder, mine = Path(place), os.environ["RANK"]
    from launch import train
    from launch.distributed import signals

    original = signals.SignalWatcher._signalled

    def noting(self: Any, number: Any) -> None:
        original(self, number)
        (folder / f"noted-{mine}").touch()

    with ExitStack() as stack:
        stack.enter_context(patch.object(signals.SignalWatcher, "_signalled", noting))
        if mine == rank and moment.startswith("operation "):
            watch_files(int(moment.split()[1]), Hold(folder))
        elif mine == rank:
            stack.enter_context(hook(moment, Hold(folder)))
        return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
